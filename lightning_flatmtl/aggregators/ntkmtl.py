"""Gradients balanced by their neural tangent kernels."""

import math
from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import ntkmtl_weights

__all__ = ["NTKMTL"]


@final
class NTKMTL(GramAggregator):
    r"""Balance by the neural tangent kernel (NTKMTL; Qin et al., 2025).

    `arXiv:2510.18258 <https://arxiv.org/abs/2510.18258>`_, with one block of samples a batch
    (:math:`n = 1`): :math:`d = \sum_i w_i g_i` with :math:`w_i = (\operatorname{tr} K /
    K_{ii})^p` and :math:`K_{ii} = \lVert g_i \rVert^2`, the tangent kernel of the task. With
    :math:`p = 1/2` every gradient has the length :math:`\sqrt{\operatorname{tr} K}` in the sum. A
    gradient of zero is left out. The published code multiplies by m besides and clips the norm
    to 1.

    If all :math:`g_i = g`, the direction is :math:`m^{1 + p}\,g`.

    Args:
        exponent: p, in ``[0, inf)``; 0 is the sum of the gradients.

    Raises:
        ValueError: If ``exponent`` is out of its bounds.

    Example:
        >>> import torch
        >>> NTKMTL()(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([5., 5.])
    """

    def __init__(self, exponent: float = 0.5) -> None:
        if not 0 <= exponent < math.inf:
            raise ValueError(f"`exponent` must be in [0, inf), got {exponent}.")
        self.exponent = exponent

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return ntkmtl_weights(gram, self.exponent)
