"""Direction-oriented multi-objective descent."""

import math
from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import sdmgrad_weights

__all__ = ["SDMGrad"]


@final
class SDMGrad(GramAggregator):
    r"""Direction-oriented multi-objective descent (SDMGrad; Xiao et al., 2023).

    `arXiv:2305.18409 <https://arxiv.org/abs/2305.18409>`_: :math:`d = (\sum_i w_i g_i + \lambda
    g_0) / (1 + \lambda)` with the mean gradient :math:`g_0` and :math:`w = \arg\min_{w \in \Delta}
    \lVert \sum_i w_i g_i + \lambda g_0 \rVert^2`. The paper moves :math:`w` by some stochastic
    steps on further batches; here the problem of the present batch is solved exactly. ``lam=0`` is
    :class:`MGDA`, a large one the mean.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        lam: Pull towards the mean gradient, in ``[0, inf)``.

    Raises:
        ValueError: If ``lam`` is out of its bounds.

    Example:
        >>> import torch
        >>> SDMGrad()(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1., 1.])
    """

    def __init__(self, lam: float = 0.3) -> None:
        if not 0 <= lam < math.inf:
            raise ValueError(f"`lam` must be in [0, inf), got {lam}.")
        self.lam = lam

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return sdmgrad_weights(gram, self.lam)
