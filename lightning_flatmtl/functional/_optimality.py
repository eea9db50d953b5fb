"""When a nonnegative quadratic program counts as solved: to the rounding of every component."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._gram import Array, Mask, rounding


def faults(K: Array, Q: Array, V: Array, support: Mask) -> tuple[Mask, Mask]:
    """What keeps the rows of V from minimising ``0.5 v K v - q v`` over ``v >= 0``, row by row.

    Args:
        K: Positive semidefinite matrix ``[m, m]``.
        Q: Linear terms ``[r, m]``.
        V: Candidates ``[r, m]``, zero outside of their supports.
        support: The variables ``[r, m]`` that are meant to be positive.

    Returns:
        The infeasible variables ``[r, m]``: not positive in the support, or with a descent
        direction outside of it. And the problems ``[r]`` that are not solved: that have one of
        these, or a slope in the support.
    """
    noise = rounding(len(K)) * (np.abs(Q) + np.abs(V) @ np.abs(K))
    slope = Q - V @ K
    infeasible = np.where(support, V <= 0, slope > noise)
    return infeasible, (infeasible | (support & (np.abs(slope) > noise))).any(axis=1)
