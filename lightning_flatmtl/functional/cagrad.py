"""Conflict-averse gradient descent: the direction near the mean that serves the worst task best."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import (
    Array,
    UnitGram,
    is_number,
    rounding,
    semidefinite_unit_gram,
    to_tensor,
)
from lightning_flatmtl.functional._nonnegative import (
    is_safely_definite,
    solve_nonnegative,
    solve_symmetric,
)
from lightning_flatmtl.functional.min_norm import min_norm_point, vanishes

_MAX_LEVELS = 200


def cagrad_weights(gram: Tensor, c: float, rescale: bool = True) -> Tensor:
    r"""Weights of the conflict-averse direction (CAGrad).

    .. math:: d = \operatorname*{arg\,max}_d \; \min_i g_i^\top d
        \quad \text{s.t.} \quad \lVert d - g_0 \rVert \le c \lVert g_0 \rVert,
        \qquad g_0 = \tfrac1m \sum_i g_i

    Liu et al., 2021, `arXiv:2110.14048 <https://arxiv.org/abs/2110.14048>`_, who write the same
    point as :math:`g_0 + (c \lVert g_0 \rVert / \lVert g_w \rVert)\, g_w` with
    :math:`g_w = w^\top G` and :math:`w` the minimiser of
    :math:`g_w^\top g_0 + c \lVert g_0 \rVert \lVert g_w \rVert` over the simplex, and search
    :math:`w` numerically. Here it is exact: :math:`d = g_0 + G^\top v` with :math:`v \ge 0` the
    solution of a nonnegative quadratic program at the level
    :math:`\mu = \min_i g_i^\top d`, and on a fixed support the level that reaches the radius is
    the root of a quadratic.

    Degenerate inputs:

    - Zero in the convex hull of the gradients (exactly opposed rows, a zero row): no direction
      has :math:`\min_i g_i^\top d > 0` and the formula above may divide by zero. Of all
      directions in the ball that harm no task the one nearest to the mean is returned, which is
      the projection of :math:`g_0` on the dual cone :math:`\{d: G d \ge 0\}`. If that lies
      outside the ball, the problem above has its usual unique solution.
    - A zero mean, or one that is zero up to the rounding error of ``gram``: the ball is a point,
      and :math:`d = g_0`.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        c: Radius of the ball relative to the norm of the mean, in ``[0, inf)``; 0 is the mean.
        rescale: Divide the direction by :math:`1 + c^2`, as the published code does.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``c`` is out of bounds, or if ``gram`` is not square, not finite, or has a
            negative diagonal.

    Example:
        >>> import torch
        >>> cagrad_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), c=0.5, rescale=False)
        tensor([1.0590, 0.5000], dtype=torch.float64)
    """
    if not is_number(c, 0, low_included=True):
        raise ValueError(f"`c` must be in [0, inf), got {c}.")
    unit = semidefinite_unit_gram(gram)
    weights = np.full(unit.size, 1.0 / unit.size)
    if c > 0 and len(unit.rows):
        weights += _correction(unit, c)
    return to_tensor(weights / (1 + c**2) if rescale else weights)


def _correction(unit: UnitGram, radius: float) -> Array:
    """Nonnegative weights v of ``d = g_0 + G'v``; ``radius`` is relative to the mean."""
    mean = unit.norms / unit.norms.max()
    along = unit.cosines @ mean
    if vanishes(mean, unit.cosines):
        return np.zeros(unit.size)
    length = math.sqrt(float(mean @ along))
    v = _Levels(unit, along / length, radius).solve()
    return unit.weights(v * (length * unit.norms.max() / unit.size))


class _Levels:
    """The correction as a function of the level, in units of the mean's norm.

    At level ``mu`` (in units of the smallest row norm) the correction ``v(mu)`` is the shortest
    that gives every unit row a slope of at least ``mu * shares``. Its squared length is convex
    and nondecreasing in ``mu``, and quadratic as long as the support stays.
    """

    def __init__(self, unit: UnitGram, along: Array, radius: float) -> None:
        self.unit, self.along, self.radius = unit, along, radius
        self.shares = unit.norms.min() / unit.norms
        self.definite = is_safely_definite(unit.cosines)  # one check for all levels

    def solve(self) -> Array:
        """The correction whose length is the radius, or the one at level 0 if none is so long."""
        at_zero = self.correction(0.0, None)
        if self.squared_length(at_zero) > self.radius**2:
            return self.search(float((self.along / self.shares).min()), 0.0, at_zero)
        if len(self.unit.rows) < self.unit.size:  # a zero row holds the level at 0
            return at_zero
        point = min_norm_point(self.unit.norms, self.unit.cosines)
        if vanishes(point, self.unit.cosines):
            return at_zero
        # No direction in the ball serves the min-norm point better than its own.
        length = math.sqrt(self.squared_length(point))
        top = length / float(self.unit.norms.min()) * (1 + self.radius)
        return self.search(0.0, top, self.correction(top, point))

    def search(self, low: float, high: float, v: Array) -> Array:
        """The correction of the right length, from its value ``v`` at the level ``high``."""
        level = high
        for _ in range(_MAX_LEVELS):
            excess = self.squared_length(v) - self.radius**2
            if abs(excess) <= self.noise(level, v):
                return v
            low, high = (low, level) if excess > 0 else (level, high)
            level = self.next_level(level, v, excess, low, high)
            if not low < level < high:
                return v  # neighbouring floating-point numbers
            v = self.correction(level, v)
        warn_not_converged("CAGrad", _MAX_LEVELS)
        return v

    def next_level(self, level: float, v: Array, excess: float, low: float, high: float) -> float:
        """The level that reaches the radius on the support of ``v``, else the bracket's middle."""
        index = np.flatnonzero(v)
        shares = self.shares[index]
        growth = solve_symmetric(self.unit.cosines[index[:, None], index], shares)
        slope, curvature = float(shares @ v[index]), float(shares @ growth)
        root = slope**2 - curvature * excess
        if root >= 0 and slope + math.sqrt(root) > 0:
            better = level - excess / (slope + math.sqrt(root))
            if low < better < high:
                return better
        return 0.5 * (low + high)

    def correction(self, level: float, start: Array | None) -> Array:
        """The shortest correction that reaches ``level`` for every row."""
        q = level * self.shares - self.along
        return solve_nonnegative(self.unit.cosines, q, start=start, definite=self.definite)

    def squared_length(self, v: Array) -> float:
        """The squared length of ``v`` as a combination of the unit rows."""
        return float(v @ self.unit.cosines @ v)

    def noise(self, level: float, v: Array) -> float:
        """Rounding error of the squared length at ``level``."""
        return rounding(len(v)) * float(v @ (abs(level) * self.shares + np.abs(self.along)))
