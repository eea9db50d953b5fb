"""Uncertainty weights in closed form."""

import math
from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.functional import uw_so_weights

__all__ = ["UWSO"]


@final
class UWSO(LossWeighting):
    r"""Soft optimal uncertainty weighting (UW-SO; Kirchdorfer et al., 2024).

    `arXiv:2408.07985 <https://arxiv.org/abs/2408.07985>`_: the weights are
    :math:`\mathrm{softmax}(1 / (T L))`, heads included: what :class:`UncertaintyWeighting` would
    learn if the losses stood still, through a softmax. Nothing is learned, so nothing lags
    behind. The losses must be positive.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        temperature: T, in ``(0, inf)``, to be tuned: it has the unit of an inverse loss. Large
            gives equal weights, small follows the smallest loss alone.

    Raises:
        ValueError: If ``temperature`` is out of its bounds, or a loss is missing or not positive.

    Example:
        >>> import torch
        >>> UWSO()(torch.eye(2), losses=[0.5, 1.0])
        tensor([0.7311, 0.2689])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be in (0, inf), got {temperature}.")
        self.temperature = temperature

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return uw_so_weights(positive(self, tasks, losses), self.temperature)
