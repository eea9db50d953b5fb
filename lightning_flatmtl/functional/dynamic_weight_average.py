"""Weights from how fast the losses fall."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import is_number
from lightning_flatmtl.functional._vectors import Vector, task_vector


def dwa_weights(newer: Vector, older: Vector, temperature: float = 2.0) -> Tensor:
    r"""Weights of the losses by their rates of descent (DWA).

    .. math:: w = m\,\mathrm{softmax}(r / T), \qquad r_i = L_i(t - 1) / L_i(t - 2)

    Liu et al., 2019, `arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_.

    Args:
        newer: :math:`L(t - 1)`, the mean losses of the last epoch, ``[m]``, finite.
        older: :math:`L(t - 2)`, those of the epoch before; where one is zero, the rate is 1.
        temperature: T, in ``(0, inf)``; the larger, the more equal the weights.

    Returns:
        Weights ``[m]`` of sum m, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> dwa_weights(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([0.8756, 1.1244], dtype=torch.float64)
    """
    if not is_number(temperature, 0, low_included=False):
        raise ValueError(f"`temperature` must be in (0, inf), got {temperature}.")
    last = task_vector("newer", newer)
    before = task_vector("older", older, len(last))
    rates = torch.where(before != 0, last / before, 1.0)
    return len(rates) * (rates / temperature).softmax(dim=0)
