"""Many nonnegative quadratic programs at once by an interior-point method."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._gram import EPS, Array, Mask, rounding
from lightning_flatmtl.functional._optimality import faults

_MAX_STEPS = 30
_PRODUCT = EPS / 64  # of a variable and its multiplier, in the mean, at the end
_KEPT = 0.995  # share of the way to the boundary that a step may go


def interior_points(K: Array, Q: Array, largest: float = np.inf) -> tuple[Array, Mask]:
    r"""Nearly minimise :math:`\tfrac12 v^\top K v - q^\top v` over :math:`v \ge 0` for each row q.

    The predictor and corrector of Mehrotra (1992), all problems in step. How many steps it takes
    hardly depends on ``K``: columns that depend on each other, or nearly do, all take part in the
    point, where methods that exchange them try one choice after the other.

    Args:
        K: Positive semidefinite matrix ``[m, m]`` with a diagonal of order 1.
        Q: Linear terms ``[r, m]``, none of them zero.
        largest: Sum of a point, for a ``q`` of order 1, beyond which its problem is given up.

    Returns:
        The points ``[r, m]``, zero where the multiplier of a variable is the larger of the two,
        and the problems ``[r]`` that they do not solve.
    """
    m = len(K)
    size = np.abs(Q).max(axis=1, keepdims=True)
    q, ridge, diagonal = Q / size, rounding(m) / 8, np.arange(m)
    v, z = np.ones_like(q), np.ones_like(q)
    points, unsolved = np.zeros_like(q), np.ones(len(q), dtype=np.bool_)
    rest = np.arange(len(q))
    for _ in range(_MAX_STEPS):
        # The ridge bounds the step; the slope is that of K, so it does not move the solution.
        system = np.repeat(K[None], len(q), axis=0)
        system[:, diagonal, diagonal] += z / v + ridge
        slope = q - v @ K
        mean = (v * z).mean(axis=1, keepdims=True)
        try:
            dv, dz = _move(system, slope, v, z, 0.0)
            step = _longest(v, z, dv, dz)
            reached = ((v + step * dv) * (z + step * dz)).mean(axis=1, keepdims=True)
            aim = (reached / mean) ** 3 * mean
            dv, dz = _move(system, slope, v, z, aim - dv * dz)
        except np.linalg.LinAlgError:
            break
        step = _KEPT * _longest(v, z, dv, dz)
        v, z = v + step * dv, z + step * dz
        points[rest] = found = v * (v > z)
        small = (v * z).mean(axis=1) <= _PRODUCT * (1 + v.sum(axis=1))
        large = found.sum(axis=1) > largest
        unsolved[rest] = on = ~small | faults(K, q, found, v > z)[1] | large
        on &= ~large
        rest, q, v, z = rest[on], q[on], v[on], z[on]
        if len(rest) == 0:
            break
    return points * size, unsolved


def _move(
    system: Array, slope: Array, v: Array, z: Array, products: Array | float
) -> tuple[Array, Array]:
    """The Newton step towards ``K v - z = q`` and the given products of v and z."""
    q = (slope + products / v)[:, :, None]
    dv = np.asarray(np.linalg.solve(system, q)[:, :, 0], dtype=np.float64)
    return dv, (products - z * dv) / v - z


def _longest(v: Array, z: Array, dv: Array, dz: Array) -> Array:
    """The largest steps, at most 1 and one for each problem, that keep v and z nonnegative."""
    fastest = np.maximum((-dv / v).max(axis=1), (-dz / z).max(axis=1))
    steps: Array = 1.0 / np.maximum(fastest, 1.0)[:, None]
    return steps
