"""Optimal uncertainty weights through a softmax."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._gram import is_number
from lightning_flatmtl.functional._vectors import Vector, positive_losses


def uw_so_weights(losses: Vector, temperature: float = 1.0) -> Tensor:
    r"""Softened optimal uncertainty weights of the losses (UW-SO).

    .. math:: w = \mathrm{softmax}\left(\frac{1}{T L}\right)

    Kirchdorfer et al., 2024, `arXiv:2408.07985 <https://arxiv.org/abs/2408.07985>`_: the weights
    :math:`1 / L_i` that uncertainty weighting (:func:`uncertainty_weights`) would end at, through
    a softmax. The losses count as constants.

    Args:
        losses: L, ``[m]``, positive.
        temperature: T, in ``(0, inf)``; the larger, the more equal the weights.

    Returns:
        Weights ``[m]`` of sum 1, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> uw_so_weights(torch.tensor([0.5, 1.0]))
        tensor([0.7311, 0.2689], dtype=torch.float64)
    """
    if not is_number(temperature, 0, low_included=False):
        raise ValueError(f"`temperature` must be in (0, inf), got {temperature}.")
    scores = 1.0 / (positive_losses(losses) * temperature)
    return scores.clamp(max=_LARGEST).softmax(dim=0)


_LARGEST = 1e300
"""The largest score; only the differences to it count, so infinite ones must not meet."""
