"""The geometric mean of the losses."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.functional import gls_weights

__all__ = ["GLS"]


@final
class GLS(LossWeighting):
    r"""Geometric loss strategy (Chennupati et al., 2019).

    `arXiv:1904.08492 <https://arxiv.org/abs/1904.08492>`_: descends on the geometric mean
    :math:`L = (\prod_i L_i)^{1/m}`, so the weights are :math:`L / (m L_i)`, heads included. The
    losses must be positive. Its direction is that of :class:`ScaleInvariant` times :math:`L / m`.

    Example:
        >>> import torch
        >>> GLS()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), losses=[1.0, 4.0])
        tensor([1.0000, 0.5000])
    """

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return gls_weights(positive(self, tasks, losses))
