"""References in 60 digits that share nothing with the solvers: they try every support.

Every function maps a float64 Jacobian ``[m, d]`` with few rows to the direction ``[d]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

DIGITS = 60
ZERO = mpf(10) ** -40

Vector = list[mpf]
Matrix = list[list[mpf]]


class Unit:
    """Unit rows, their norms and cosines in high precision, zero rows left out."""

    def __init__(self, jacobian: Tensor) -> None:
        mpmath.mp.dps = DIGITS
        self.raw = [[mpf(x) for x in row] for row in jacobian.double().tolist()]
        lengths = [mpmath.sqrt(mpmath.fdot(row, row)) for row in self.raw]
        self.rows = [i for i, length in enumerate(lengths) if length > 0]
        self.norms = [lengths[i] for i in self.rows]
        self.units = [[x / lengths[i] for x in self.raw[i]] for i in self.rows]
        self.cosines = [[mpmath.fdot(a, b) for b in self.units] for a in self.units]
        self.shares = [min(self.norms) / n for n in self.norms] if self.rows else []
        self.size = len(self.raw)

    def direction(self, unit_weights: Sequence[mpf]) -> Tensor:
        columns = zip(*self.units, strict=True)
        return torch.tensor(
            [float(mpmath.fdot(unit_weights, column)) for column in columns],
            dtype=torch.float64,
        )


def times(K: Matrix, v: Sequence[mpf]) -> Vector:
    return [mpmath.fdot(row, v) for row in K]


def solve(K: Matrix, q: Sequence[mpf]) -> Vector | None:
    """Gauss-Jordan with full pivoting on the diagonal; None if a pivot is zero."""
    n = len(q)
    rows = [[*K[i], q[i]] for i in range(n)]
    for i in range(n):
        if abs(rows[i][i]) < ZERO:
            return None
        for k in range(n):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def supports(n: int) -> Iterator[tuple[int, ...]]:
    for count in range(n + 1):
        yield from combinations(range(n), count)


def block(K: Matrix, support: Sequence[int]) -> Matrix:
    return [[K[i][j] for j in support] for i in support]


def spread(x: Sequence[mpf], support: Sequence[int], n: int) -> Vector:
    v = [mpf(0)] * n
    for value, i in zip(x, support, strict=True):
        v[i] = value
    return v


def nonnegative(K: Matrix, q: Sequence[mpf]) -> Vector:
    """The minimiser of v'Kv/2 - q'v over v >= 0."""
    size = max(map(abs, q))
    for support in supports(len(q)):
        x = solve(block(K, support), [q[i] for i in support])
        if x is None or any(value < 0 for value in x):
            continue
        v = spread(x, support, len(q))
        if all(b - a <= ZERO * size for a, b in zip(times(K, v), q, strict=True)):
            return v
    raise AssertionError("no support is optimal")


def min_norm(jacobian: Tensor) -> Tensor:
    unit = Unit(jacobian)
    if len(unit.rows) < unit.size:
        return torch.zeros(jacobian.shape[1], dtype=torch.float64)
    return unit.direction(_min_norm_point(unit))


def _min_norm_point(unit: Unit) -> Vector:
    """For every support the nearest point of its affine hull; the nearest feasible one wins."""
    best: tuple[mpf, Vector] | None = None
    for support in supports(len(unit.rows)):
        C = block(unit.cosines, support)
        shares = [unit.shares[i] for i in support]
        # The affine hull's nearest point: [C, -shares; shares', 0] [y; level] = [0; 1].
        M = [
            [a + r * s for a, s in zip(row, shares, strict=True)]
            for row, r in zip(C, shares, strict=True)
        ]
        x = solve(M, shares)
        if not x or any(value < 0 for value in x):
            continue
        total = mpmath.fdot(x, shares)
        y = spread([value / total for value in x], support, len(unit.rows))
        length = mpmath.fdot(y, times(unit.cosines, y))
        if best is None or length < best[0]:
            best = length, y
    assert best is not None
    return [value * min(unit.norms) for value in best[1]]


def dual_cone_projection(unit: Unit, weights: Sequence[mpf]) -> Vector:
    """Weights of the projection of a combination of the unit rows on {d: G d >= 0}."""
    v = nonnegative(unit.cosines, [-x for x in times(unit.cosines, weights)])
    return [a + b for a, b in zip(v, weights, strict=True)]


def cagrad(jacobian: Tensor, c: float) -> Tensor:
    unit = Unit(jacobian)
    mean = [n / unit.size for n in unit.norms]
    slopes = times(unit.cosines, mean)
    squared = mpmath.fdot(mean, slopes)
    if not unit.rows or squared <= ZERO * max(unit.norms) ** 2:
        return jacobian.double().mean(dim=0)
    n, radius = len(unit.rows), mpf(c) ** 2 * squared
    for support in supports(n):
        C = block(unit.cosines, support)
        p = solve(C, [unit.shares[i] for i in support])
        s = solve(C, [slopes[i] for i in support])
        if not support or p is None or s is None:
            continue
        a = mpmath.fdot(p, [unit.shares[i] for i in support])
        b = mpmath.fdot(s, [unit.shares[i] for i in support])
        e = mpmath.fdot(s, [slopes[i] for i in support])
        root = b * b - a * (e - radius)
        for sign in (1, -1) if root >= 0 else ():
            level = (b + sign * mpmath.sqrt(root)) / a
            v = spread([level * x - y for x, y in zip(p, s, strict=True)], support, n)
            reached = [x + y for x, y in zip(times(unit.cosines, v), slopes, strict=True)]
            size = mpmath.sqrt(squared)
            if (
                min(v) >= 0
                and (level <= 0 or len(unit.rows) == unit.size)
                and all(
                    r >= level * h - ZERO * size for r, h in zip(reached, unit.shares, strict=True)
                )
            ):
                return unit.direction([x + y for x, y in zip(v, mean, strict=True)])
    return unit.direction(dual_cone_projection(unit, mean))


def upgrad(jacobian: Tensor, preference: Sequence[float] | None = None) -> Tensor:
    unit = Unit(jacobian)
    total = torch.zeros(jacobian.shape[1], dtype=torch.float64)
    for k, i in enumerate(unit.rows):
        share = mpf(1) / unit.size if preference is None else mpf(preference[i])
        own = spread([share * unit.norms[k]], [k], len(unit.rows))
        total += unit.direction(dual_cone_projection(unit, own))
    return total


def imtl_g(jacobian: Tensor) -> Tensor:
    """The limit of (C + eps I)^-1 1, scaled to weights of sum 1, at eps = 1e-25."""
    unit = Unit(jacobian)
    if not unit.rows:
        return torch.zeros(jacobian.shape[1], dtype=torch.float64)
    eps = mpf(10) ** -25
    C = [[x + eps * (i == j) for j, x in enumerate(row)] for i, row in enumerate(unit.cosines)]
    y = solve(C, [mpf(1)] * len(C))
    assert y is not None
    total = sum(a / n for a, n in zip(y, unit.norms, strict=True))
    return unit.direction([a / total for a in y])


def pcgrad(jacobian: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 of the paper, row by row."""
    rows = jacobian.double()
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(order.tolist()):
        current = rows[i].clone()
        for j in row:
            if j != i and current @ rows[j] < 0:
                current -= (current @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        total += current
    return total


def aligned_mtl(jacobian: Tensor, scale: str) -> Tensor:
    """From the eigenvectors of the Gram of the nonzero rows in 60 digits."""
    unit = Unit(jacobian)
    if not unit.rows:
        return torch.zeros(jacobian.shape[1], dtype=torch.float64)
    n = len(unit.rows)
    K = mpmath.matrix(
        [[unit.norms[i] * unit.cosines[i][j] * unit.norms[j] for j in range(n)] for i in range(n)]
    )
    values, vectors = mpmath.eigsy(K)
    kept = [k for k in range(n) if values[k] > ZERO * max(values)]
    ordered = sorted(values[k] for k in kept)
    common = {
        "min": ordered[0],
        "median": ordered[(len(ordered) - 1) // 2],
        "rmse": sum(ordered) / len(ordered),
    }[scale]
    y = [mpf(0)] * n
    for k in kept:
        column = [vectors[i, k] for i in range(n)]
        factor = mpmath.sqrt(common / values[k]) * sum(column) / unit.size
        y = [a + factor * b * norm for a, b, norm in zip(y, column, unit.norms, strict=True)]
    return unit.direction(y)


def gradvac(jacobian: Tensor, order: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, row by row: the direction and the cosines met."""
    rows, cosines = jacobian.double(), targets.clone()
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(order.tolist()):
        current = rows[i].clone()
        for j in row:
            if j == i:
                continue
            cosine = (current @ rows[j]) / (current.norm() * rows[j].norm())
            target = targets[i, j]
            cosines[i, j] = cosine
            if cosine < target:
                sine, target_sine = (1 - cosine**2).sqrt(), (1 - target**2).sqrt()
                amount = current.norm() * (target * sine - cosine * target_sine)
                current += amount / (rows[j].norm() * target_sine) * rows[j]
        total += current
    return total, cosines
