"""The sum of the logarithms of the losses."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.functional import scale_invariant_weights

__all__ = ["ScaleInvariant"]


@final
class ScaleInvariant(LossWeighting):
    r"""Scale-invariant weighting (SI): descends on :math:`\sum_i \log L_i`.

    The weights are :math:`1 / L_i`, heads included, so that multiplying a loss by a constant
    changes nothing (a baseline of Navon et al., 2022, `arXiv:2202.01017
    <https://arxiv.org/abs/2202.01017>`_). The losses must be positive.

    Example:
        >>> import torch
        >>> ScaleInvariant()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), losses=[0.5, 4.0])
        tensor([2.0000, 0.5000])
    """

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return scale_invariant_weights(positive(self, tasks, losses))
