"""The preference among tasks that a solver is given, checked."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._gram import Array
from lightning_flatmtl.functional._vectors import Vector, task_vector

__all__ = ["shares_of"]


def shares_of(
    preference: Vector | None,
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
    return task_vector(
        "preference", preference, size, "(0, inf)" if positive else "[0, inf)"
    ).numpy()
