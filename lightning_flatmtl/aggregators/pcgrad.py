"""Projecting conflicting gradients."""

from typing import Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._random import RandomAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import pcgrad_weights

__all__ = ["PCGrad"]


@final
class PCGrad(RandomAggregator, GramAggregator):
    r"""Gradient surgery (Yu et al., 2020, `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_).

    Every :math:`g_i` is projected, in random order, off each :math:`g_j` with which it conflicts
    (:math:`\langle g_i', g_j \rangle < 0`); the results are summed. Computed on the weights of the
    gradients, in the Gram; with two tasks the order does not matter.

    If all :math:`g_i = g`, the direction is :math:`m\,g` (sum) or :math:`g` (mean).

    Args:
        reduction: ``"sum"`` as in the paper, or ``"mean"``, the sum divided by m.
        seed: Seed of the private generator of the orders, ``seed >= 0``.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    def __init__(self, reduction: Literal["sum", "mean"] = "sum", seed: int = 0) -> None:
        super().__init__(seed)
        if reduction not in {"sum", "mean"}:
            raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
        self.reduction = reduction

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        m = len(gram)
        order = torch.rand(m, m, generator=self._generator).argsort(dim=1)
        return pcgrad_weights(gram, order, reduction=self.reduction)
