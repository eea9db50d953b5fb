"""Eigenvalues of a Gram matrix with high relative accuracy, however badly it is scaled."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import EPS, Array, Indices, UnitGram, rounding

# Above this share of the largest eigenvalue the plain solver leaves two thirds of the digits.
_PLAIN_SHARE = EPS ** (1 / 3)
# With less difference between norms small eigenvalues come from near-parallel rows, and then the
# rounding error of the Gram itself limits them: no solver does better than the plain one.
_PLAIN_SPREAD = 100.0
_MAX_SWEEPS = 40
_LAST_OVERLAP = EPS**0.5
_TINY = float(np.finfo(np.float64).tiny)  # makes 0 / 0 a 0


def gram_eigenpairs(unit: UnitGram) -> tuple[Array, Array]:
    """Nonzero eigenvalues ``[r]`` and eigenvectors ``[m', r]`` of the Gram of the nonzero rows.

    A plain symmetric solver computes eigenvalues to the rounding error of the largest one, so
    that rows of norms 1e-8 and 1e8 would pass for dependent. Where that matters, a one-sided
    Jacobi method on the pivoted Cholesky factor takes over: its relative accuracy depends on the
    condition of the cosines, not of the scales (Demmel and Veselic, 1992).
    """
    top = unit.norms.max()
    norms = unit.norms / top
    values, vectors = np.linalg.eigh(norms[:, None] * unit.cosines * norms)
    kernel = values <= rounding(len(norms)) * norms.min() ** 2
    if norms.min() * _PLAIN_SPREAD < 1:
        # What the plain solver takes for the kernel may be a small eigenvalue that it has lost.
        doubtful = values <= _PLAIN_SHARE * values[-1]
    else:
        doubtful = ~kernel & (values <= rounding(len(norms)) * values[-1])
    if doubtful.any():
        values, vectors = _one_sided_jacobi(_pivoted_factor(unit.cosines, norms))
        kernel = np.zeros(len(values), dtype=np.bool_)
    return values[~kernel] * top**2, vectors[:, ~kernel]


def _pivoted_factor(cosines: Array, norms: Array) -> Array:
    """Rows ``[r, m]`` of a factor with ``rows' rows = norms * cosines * norms``.

    Cholesky with complete pivoting: the longest remainder of a raw row comes first. A remainder
    is a combination of unit rows, so the sizes of its coefficients tell its rounding error.
    """
    remaining, rest = cosines.copy(), np.ones(len(norms))
    combined = np.eye(len(norms))
    rows: list[Array] = []
    while True:
        noise = rounding(len(norms)) * np.abs(combined).sum(axis=1) ** 2
        lengths = np.where(rest > noise, rest * norms**2, 0.0)
        pivot = int(lengths.argmax())
        if lengths[pivot] == 0:
            return np.array(rows)
        row = remaining[pivot] / np.sqrt(rest[pivot])
        combined -= (remaining[pivot] / rest[pivot])[:, None] * combined[pivot]
        remaining -= row[:, None] * row
        remaining[pivot] = remaining[:, pivot] = 0.0
        rest = remaining.diagonal()
        rows.append(row * norms)


def _one_sided_jacobi(rows: Array) -> tuple[Array, Array]:
    """Eigenpairs of ``rows' rows`` by rotations that make the rows orthogonal."""
    count, size = rows.shape
    rows = np.vstack([rows, np.zeros((count % 2, size))])
    tolerance, overlap = rounding(size), 1.0
    for _ in range(_MAX_SWEEPS):
        previous, overlap = overlap, _largest_overlap(rows)
        # Sweeps converge quadratically in the end, so one that does not halve met rounding error.
        if overlap <= tolerance or (previous <= _LAST_OVERLAP and 2 * overlap > previous):
            break
        for first, second in _tournament(len(rows)):
            _rotate(rows, first, second, tolerance)
    else:
        warn_not_converged("The Jacobi eigenvalue method", _MAX_SWEEPS)
    lengths = np.linalg.norm(rows, axis=1)
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    return lengths**2, (rows / lengths[:, None]).T


def _largest_overlap(rows: Array) -> float:
    """The largest product of two rows, relative to the sum of its terms' sizes.

    A product relative to the lengths would not do: the long row's share in the short row's
    eigenvector counts by its length.
    """
    sizes = np.abs(rows)
    products = np.abs(rows @ rows.T)
    np.fill_diagonal(products, 0.0)
    return float((products / (sizes @ sizes.T + _TINY)).max())


def _rotate(rows: Array, first: Indices, second: Indices, tolerance: float) -> None:
    """Make disjoint pairs of rows orthogonal."""
    a, b = rows[first], rows[second]
    aa, bb, ab = ((x * y).sum(axis=1) for x, y in ((a, a), (b, b), (a, b)))
    needed = np.abs(ab) > tolerance * np.abs(a * b).sum(axis=1)
    ratio = np.where(needed, bb - aa, 0.0) / np.where(needed, 2 * ab, 1.0)
    tangent = np.copysign(1.0, ratio) / (np.abs(ratio) + np.hypot(1.0, ratio))
    tangent = np.where(needed, tangent, 0.0)[:, None]
    cosine = 1 / np.hypot(1.0, tangent)
    rows[first] = cosine * (a - tangent * b)
    rows[second] = cosine * (b + tangent * a)


@lru_cache(maxsize=64)
def _tournament(count: int) -> tuple[tuple[Indices, Indices], ...]:
    """Rounds of disjoint pairs in which each of an even number of rows meets every other."""
    circle = list(range(count))
    rounds = []
    for _ in range(count - 1):
        half = count // 2
        rounds.append((np.array(circle[:half]), np.array(circle[: half - 1 : -1])))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return tuple(rounds)
