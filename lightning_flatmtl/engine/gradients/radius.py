"""A perturbation of exactly the radius, along a gradient of any length."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Move", "move_along"]

_SHORT, _LONG = 1e-24, 1e24
"""Squared norms between which the radius over the norm, and what is multiplied by it, is a normal
number in 32 bits."""
_TINY, _HUGE = 1e-280, 1e280
"""Squared norms beyond which 64 bits have lost them."""


class Move(NamedTuple):
    """Parameters are to move by ``factor * scale * row``; ``None`` is a scale of ones."""

    row: Tensor
    factor: float
    scale: Tensor | None = None


@torch.no_grad()
def move_along(
    row: Tensor,
    rho: float,
    squared_norm: float,
    values: Tensor | None = None,
    squares: Tensor | None = None,
    whole: bool = True,
) -> Move:
    r"""How parameters move by ``rho`` along the gradient ``row``.

    A gradient whose every entry is zero in its type has no direction and moves nothing. However
    short any other is, the move is as long as the radius: the radius over a norm of 1e-40 is no
    number in 32 bits, so there the gradient is brought to length one first.

    Args:
        row: The gradient, ``[d]``.
        rho: The radius.
        squared_norm: Of the gradient, or, adaptive, of the gradient times ``values``.
        values: The parameters, ``[d]``, if the perturbation is adaptive.
        squares: Their squares.
        whole: Whether ``row`` holds all entries that ``squared_norm`` counts.

    Example:
        >>> import torch
        >>> move = move_along(torch.tensor([3e-42, 4e-42]), 0.5, 25e-84)
        >>> bool(torch.allclose(move.factor * move.row, torch.tensor([0.3, 0.4]), rtol=1e-3))
        True
    """
    if rho == 0.0:
        return Move(row, 0.0)
    if _SHORT < squared_norm < _LONG:
        return Move(row, rho / math.sqrt(squared_norm), squares)
    in_32_bits = row.dtype != torch.float64 and row.device.type != "mps"
    if squared_norm == 0.0 and (in_32_bits or not whole):
        return Move(row, 0.0)
    device = torch.device("cpu") if row.device.type == "mps" else row.device
    unit = row.to(device, torch.float64)
    weights = None if values is None else values.to(device, torch.float64)
    if _TINY < squared_norm < _HUGE or not whole:
        unit = _weighed(unit, weights) / math.sqrt(squared_norm)
    else:  # lost in the square
        unit = _normalized(_weighed(_shrunk(unit), weights))
    return Move((_weighed(unit, weights) * rho).to(row), 1.0)


def _weighed(vector: Tensor, weights: Tensor | None) -> Tensor:
    return vector if weights is None else vector * weights


def _shrunk(vector: Tensor) -> Tensor:
    """``vector`` over its largest entry; zeros stay zeros."""
    largest = vector.abs().amax() if len(vector) else vector.sum()
    return torch.where(largest > 0, vector / largest, 0.0)


def _normalized(vector: Tensor) -> Tensor:
    vector = _shrunk(vector)
    return torch.where(vector.any(), vector / vector.norm(), 0.0)
