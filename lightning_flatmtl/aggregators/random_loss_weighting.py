"""Random weights of the losses."""

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._random import RandomAggregator
from lightning_flatmtl.functional import softmax_weights

__all__ = ["RandomLossWeighting"]


@final
class RandomLossWeighting(RandomAggregator, LossWeighting):
    r"""Random loss weighting (RLW; Lin et al., 2022).

    `arXiv:2111.10603 <https://arxiv.org/abs/2111.10603>`_: :math:`w = m\,\mathrm{softmax}(z)` with
    :math:`z \sim \mathcal N(0, I_m)`, drawn anew for every step, the same for its loss part and its
    flat part, on the CPU so that all ranks agree. The published code uses weights that sum to 1,
    the project's convention is m: if all :math:`g_i = g`, the direction is :math:`m\,g`.

    Args:
        seed: Seed of the private generator, ``seed >= 0``.

    Raises:
        ValueError: If ``seed`` is out of its bounds.

    Example:
        >>> import torch
        >>> RandomLossWeighting()(torch.ones(2, 3))
        tensor([2., 2., 2.])
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        z = torch.randn(len(tasks), generator=self._generator, dtype=torch.float64)
        return softmax_weights(z)
