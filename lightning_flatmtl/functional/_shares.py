"""The preference among tasks that a solver is given, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import Array, refuse_unreadable

__all__ = ["shares_of"]


def shares_of(
    preference: Tensor | Sequence[float] | None,
    size: int,
    *,
    otherwise: float,
    positive: bool = False,
) -> Array:
    """Weights ``[m]`` of the tasks.

    Args:
        preference: What was given.
        size: The number of tasks.
        otherwise: The weight of each where nothing was given.
        positive: Whether zero is refused.

    Raises:
        ValueError: If they are not ``[m]``, or one is out of bounds, NaN or infinite.
    """
    if preference is None:
        return np.full(size, otherwise)
    if isinstance(preference, list | tuple):
        preference = torch.tensor(preference, dtype=torch.float64)
    refuse_unreadable("preference", preference)
    assert isinstance(preference, Tensor)
    if preference.shape != (size,):
        raise ValueError(f"`preference` must have shape [{size}], got {list(preference.shape)}.")
    shares: Array = preference.detach().to("cpu", torch.float64).numpy()
    wrong = ~(np.isfinite(shares) & (shares > 0 if positive else shares >= 0))
    if wrong.any():
        index = int(wrong.argmax())
        bounds = "(0, inf)" if positive else "[0, inf)"
        raise ValueError(f"`preference` must be in {bounds}, got {shares[index]} at {index}.")
    return shares
