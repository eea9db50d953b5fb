"""The best direction for the worst task in a cone around the mean gradient."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import conic_grad_weights

__all__ = ["ConicGrad"]


@final
class ConicGrad(GramAggregator):
    r"""Gradients in a cone around the mean (ConicGrad; Hassanpour et al., 2025).

    `arXiv:2502.00217 <https://arxiv.org/abs/2502.00217>`_: :math:`d` maximises the least gain
    :math:`\min_i g_i^\top d` over the directions whose cosine with the mean gradient :math:`g_0`
    is at least ``c``, and is as long as :math:`g_0`. That problem is solved exactly here: :math:`d`
    lies along :math:`\sum_i w_i g_i + \lambda g_0`, as in :class:`SDMGrad`, with the least
    :math:`\lambda` that takes it into the cone. ``c=0`` has the direction of :class:`MGDA`,
    ``c=1`` is the mean.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        c: Least cosine with the mean gradient, in ``[0, 1]``.

    Raises:
        ValueError: If ``c`` is out of its bounds.

    Example:
        >>> import torch
        >>> ConicGrad(c=0.8)(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([2., 1.])
    """

    def __init__(self, c: float = 0.5) -> None:
        if not 0 <= c <= 1:
            raise ValueError(f"`c` must be in [0, 1], got {c}.")
        self.c = c

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return conic_grad_weights(gram, self.c)
