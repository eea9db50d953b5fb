"""The best direction for the worst task in a cone around the mean gradient."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import (
    EPS,
    Array,
    rounding,
    semidefinite_unit_gram,
    to_tensor,
)
from lightning_flatmtl.functional._nonnegative import solve_nonnegative
from lightning_flatmtl.functional.min_norm import min_norm_weights

_MAX_STEPS = 200
_ACCURACY = 1e-13  # of the cosine
_BEYOND = 1e-3  # the pull at which a point comes off zero, so far that it has a clear direction


def conic_grad_weights(gram: Tensor, c: float = 0.5) -> Tensor:
    r"""Weights of the best direction for the worst task in a cone around the mean (ConicGrad).

    .. math:: d = \operatorname*{arg\,max}_d \; \min_i g_i^\top d
        \quad \text{s.t.} \quad g_0^\top d \ge c\, \lVert g_0 \rVert \lVert d \rVert, \quad
        \lVert d \rVert = \lVert g_0 \rVert, \qquad g_0 = \tfrac1m \sum_i g_i

    Hassanpour et al., 2025, `arXiv:2502.00217 <https://arxiv.org/abs/2502.00217>`_. By duality
    :math:`d` has the direction of :math:`p(\mu) = \sum_i w_i g_i + \mu\, g_0` with the w on the
    simplex that make it shortest, and the least pull :math:`\mu \ge 0` that takes it into the
    cone. Where the same tasks have weight :math:`p(\mu)` is linear in the pull, so the pull is
    found exactly, as the root of a quadratic.

    Degenerate inputs:

    - Zero in the convex hull of the gradients (a zero row, opposed rows): no direction serves
      all tasks, and :math:`p(0) = 0`. The direction is the limit from above: if that lies in the
      cone, it is that of the vector nearest to the mean that harms no task.
    - A zero mean, or one that is zero up to the rounding error of ``gram``: :math:`d = g_0`.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        c: Least cosine with the mean, in ``[0, 1]``; 0 is the direction of the min-norm point, 1
            is the mean.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``c`` is out of bounds, or if ``gram`` is not square, not finite, or has a
            negative diagonal.

    Example:
        >>> import torch
        >>> conic_grad_weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]), c=0.0)
        tensor([2.0000, 0.1250], dtype=torch.float64)
        >>> conic_grad_weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]), c=1.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if not 0 <= c <= 1:
        raise ValueError(f"`c` must be in [0, 1], got {c}.")
    unit = semidefinite_unit_gram(gram)
    mean = np.full(unit.size, 1.0 / unit.size)
    if c == 1 or len(unit.rows) == 0:
        return to_tensor(mean)
    cosines, norms = unit.padded()
    lengths = norms / norms.max()
    K = cosines * lengths[:, None] * lengths
    if _vanishes(K, mean):
        return to_tensor(mean)
    cone = _Cone(K, c)
    nearest = solve_nonnegative(unit.cosines, -cone.along[unit.rows] / lengths[unit.rows])
    correction = np.zeros(unit.size)
    correction[unit.rows] = nearest / lengths[unit.rows]
    weights = cone.direction(mean + correction / cone.length)
    return to_tensor(weights * (cone.length / cone.norm(weights)))


def _vanishes(K: Array, v: Array) -> bool:
    """Whether the rows with weights ``v`` sum to zero, within the rounding error of their Gram."""
    bound = rounding(len(v)) * float(np.abs(v) @ np.abs(K) @ np.abs(v))
    return float(v @ K @ v) <= bound


class _Cone:
    """The cone around the mean of rows whose longest is 1, and the pull that leads into it.

    A point is given by the weights of its rows. The pull is in units of the unit vector along the
    mean, which is not zero.
    """

    def __init__(self, K: Array, c: float) -> None:
        self.K, self.c = K, c
        self.length = math.sqrt(float(K.mean()))
        """The norm of the mean."""
        self.unit = np.full(len(K), 1.0 / (len(K) * self.length))
        """Weights of the unit vector along the mean."""
        self.along = K @ self.unit
        """Inner products of the rows with it."""

    def norm(self, v: Array) -> float:
        """The norm of the point."""
        return math.sqrt(max(float(v @ self.K @ v), 0.0))

    def vanishes(self, v: Array) -> bool:
        """Whether the point is zero."""
        return _vanishes(self.K, v)

    def excess(self, v: Array) -> float:
        """The cosine with the mean, less the least allowed; -inf of a point that is zero."""
        return -math.inf if self.vanishes(v) else float(v @ self.along) / self.norm(v) - self.c

    def pulled(self, pull: float) -> Array:
        """The shortest point of the hull moved along the mean by ``pull``."""
        shifted = self.K + pull * (self.along[:, None] + self.along) + pull**2
        np.fill_diagonal(shifted, np.maximum(shifted.diagonal(), 0.0))
        w = min_norm_weights(to_tensor(shifted)).numpy()
        point: Array = w + pull * self.unit
        return point

    def direction(self, harmless: Array) -> Array:
        """A point of the wanted direction.

        Args:
            harmless: The point nearest to the mean that harms no task: the direction of the
                shortest points for little pulls, where that without any is zero.
        """
        start = self.pulled(0.0)
        if self.vanishes(start):
            start = harmless
        if self.excess(start) >= 0:
            return start
        # The hull's point is no longer than 1, so that twice its distance is pull enough.
        return self.search(2.0 / math.sqrt(1 - self.c**2))

    def search(self, high: float) -> Array:
        """The shortest point at the least pull whose shortest point lies in the cone."""
        low, below, above = 0.0, self.pulled(0.0), self.pulled(high)
        halve = False
        for _ in range(_MAX_STEPS):
            zero = self.vanishes(below)
            if zero and high - low <= _BEYOND:
                return self.pulled(high + _BEYOND)
            if high - low <= 4 * EPS * high:
                return above
            pull = low + (high - low) * (0.5 if halve or zero else self.share(below, above))
            if not low < pull < high:
                return above
            point, width = self.pulled(pull), high - low
            excess = self.excess(point)
            if abs(excess) <= _ACCURACY:
                return point
            if excess < 0:
                low, below = pull, point
            else:
                high, above = pull, point
            halve = high - low > 0.5 * width and not halve
        warn_not_converged("ConicGrad", _MAX_STEPS)
        return above

    def share(self, below: Array, above: Array) -> float:
        """Where on the segment between two points, the second one inside, the cone begins."""
        step = above - below
        a, b = float(below @ self.along), float(step @ self.along)
        far, near = self.K @ step, self.K @ below
        # (a + b t)^2 = c^2 |below + t step|^2
        square = b * b - self.c**2 * float(step @ far)
        middle = a * b - self.c**2 * float(step @ near)
        constant = a * a - self.c**2 * float(below @ near)
        root = math.sqrt(max(middle * middle - square * constant, 0.0))
        # constant < 0: exactly one root, at which the left side grows faster, lies ahead.
        return -constant / (middle + root) if middle + root > 0 else 0.5
