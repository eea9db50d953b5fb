"""Nonnegative quadratic programs on a (possibly singular) Gram matrix."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import EPS, Array, Indices, Mask, rounding
from lightning_flatmtl.functional._interior import interior_points
from lightning_flatmtl.functional._optimality import faults

# Block pivoting trusts a set whose pivots keep half of the digits; the rest is for the safeguard.
_SAFE_PIVOT = EPS**0.5
_BLOCK_PATIENCE = 3
_MAX_BLOCK_ROUNDS = 12
_FEW_PROBLEMS = 8  # so many are solved sooner one after the other than by interior points
_LARGEST = 256.0  # of the sum of a solution that needs no second look
_PROGRESS = 0.4  # share of the problems that a round of pivoting must bring nearer
_MAX_EXCHANGES = 10  # per variable; the active-set method rarely needs 2
_TINY = float(np.finfo(np.float64).tiny)  # makes 0 / 0 a 0


def solve_nonnegative(
    K: Array, q: Array, *, start: Array | None = None, definite: bool = False
) -> Array:
    r"""Minimise :math:`\tfrac12 v^\top K v - q^\top v` over :math:`v \ge 0`.

    Block principal pivoting (Portugal, Judice and Vicente, 1994) exchanges all infeasible
    variables at once and needs a handful of linear solves; it has no guarantee on singular
    matrices. Where it meets one, or does not settle, the active-set method in the style of Lawson
    and Hanson (1974) takes over, which decreases the objective monotonically and treats
    dependent columns exactly.

    Optimality is judged per component, against the rounding error of that component.

    Args:
        K: Positive semidefinite matrix ``[m, m]`` with a diagonal of order 1 (scaled variables).
        q: Linear term ``[m]``; the problem must be bounded below.
        start: A solution of a nearby problem; its support is the first guess.
        definite: Whether ``K``, and then every block of it, is known to be safely definite.

    Returns:
        The minimiser ``[m]``. It is unique up to the kernel of ``K``.
    """
    size = np.abs(q)
    first = q > 0 if start is None else start > 0
    solution = _block_pivoting(K, q, size, first, definite)
    if solution is None:
        solution = _active_set(K, q, size, np.zeros_like(q) if start is None else start)
    return solution


def solve_nonnegative_many(K: Array, Q: Array) -> Array:
    """Solve :func:`solve_nonnegative` for every row of ``Q`` ``[r, m]``; solutions ``[r, m]``.

    The pivoting of all problems runs together, which for many small problems is several times
    faster than one after the other. Where dependent or nearly dependent columns keep it from
    settling, interior points tell the columns of a solution from the others.
    """
    solutions, unsolved = np.zeros_like(Q), np.arange(len(Q))
    if is_safely_definite(K):
        solutions, unsolved = _pivoting_many(K, Q, Q > 0)
    elif len(Q) > _FEW_PROBLEMS and K.min() > rounding(len(K)) - 1:
        # Rows that are opposed but for their last digits would be left over by all of it.
        solutions, unsolved = _singular_many(K, Q)
    start = None
    for problem in unsolved:
        # Most columns that one solution needs the next one needs too.
        start = solutions[problem] if solutions[problem].any() else start
        start = solutions[problem] = solve_nonnegative(K, Q[problem], start=start)
    return solutions


def _singular_many(K: Array, Q: Array) -> tuple[Array, Indices]:
    """Solve what pivoting and interior points can; the solutions and the problems left over."""
    # An error of K in its last digit may outweigh all that very large terms gain; the active-set
    # method lets no column in whose pivot is of that size.
    largest = _LARGEST * np.abs(Q).max(axis=1)
    solutions, unsolved = _pivoting_many(K, Q, Q > 0, definite=False)
    if len(unsolved) > _FEW_PROBLEMS:
        solutions[unsolved], wrong = interior_points(K, Q[unsolved], _LARGEST)
        unsolved = unsolved[wrong]
        unsolved = unsolved[solutions[unsolved].sum(axis=1) <= largest[unsolved]]
        support = solutions[unsolved] > 0
        solutions[unsolved], rest = _pivoting_many(K, Q[unsolved], support, definite=False)
        unsolved = unsolved[rest]
    left_over = solutions.sum(axis=1) > largest
    solutions[left_over] = 0.0
    left_over[unsolved] = True
    return solutions, np.flatnonzero(left_over)


def _pivoting_many(
    K: Array, Q: Array, support: Mask, *, definite: bool = True
) -> tuple[Array, Indices]:
    """Exchange the infeasible variables of each problem at once, from the given supports.

    Returns:
        The last points, and the indices of the problems that they do not solve.
    """
    solutions, unsolved = np.zeros_like(Q), np.arange(len(Q))
    fewest = np.full(len(Q), len(K) + 1)
    # With a ridge of rounding size dependent columns have a solution too; one step of refinement
    # takes the ridge out, and K itself judges what comes.
    solvable = K if definite else K + rounding(len(K)) / 8 * np.eye(len(K))
    settling = True
    for _ in range(_MAX_BLOCK_ROUNDS):
        if len(unsolved) == 0 or (not settling and len(unsolved) > _FEW_PROBLEMS):
            break
        q = Q[unsolved]
        try:
            v = _solve_on(solvable, q, support)
            if not definite:
                v += _solve_on(solvable, q - v @ K, support)
        except np.linalg.LinAlgError:
            break
        infeasible, wrong = faults(K, q, v, support)
        solutions[unsolved] = np.maximum(v, 0.0)
        settling = definite or _come_nearer(infeasible, unsolved, fewest)
        unsolved, support = unsolved[wrong], (support ^ infeasible)[wrong]
    return solutions, unsolved


def _come_nearer(infeasible: Mask, problems: Indices, fewest: Indices) -> bool:
    """Whether enough of the problems have fewer infeasible variables than ever; notes how many."""
    count = infeasible.sum(axis=1)
    nearer = count < fewest[problems]
    fewest[problems[nearer]] = count[nearer]
    return bool(nearer.mean() >= _PROGRESS)


def _solve_on(K: Array, Q: Array, support: Mask) -> Array:
    """Minimisers on given supports, all sets padded to the size of the largest."""
    width = int(support.sum(axis=1).max(initial=0))
    index = np.argsort(~support, axis=1, kind="stable")[:, :width]
    inside = np.take_along_axis(support, index, axis=1)
    blocks = K[index[:, :, None], index[:, None, :]]
    blocks *= inside[:, :, None] & inside[:, None, :]
    blocks[:, np.arange(width), np.arange(width)] += ~inside
    q = np.take_along_axis(Q, index, axis=1) * inside
    v = np.zeros_like(Q)
    np.put_along_axis(v, index, np.linalg.solve(blocks, q[:, :, None])[:, :, 0], axis=1)
    return v


def is_safely_definite(K: Array) -> bool:
    """Whether the Cholesky pivots of ``K`` (diagonal of order 1) keep at least half the digits."""
    try:
        factor = np.linalg.cholesky(K)
    except np.linalg.LinAlgError:
        return False
    return bool(factor.diagonal().min(initial=1.0) ** 2 > _SAFE_PIVOT)


def solve_symmetric(K: Array, q: Array) -> Array:
    """The solution of ``K x = q``, the shortest of the best ones where ``K`` is singular."""
    try:
        return np.asarray(np.linalg.solve(K, q), dtype=np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(K, q, rcond=rounding(len(q)))[0], dtype=np.float64)


def _noise(K: Array, size: Array, v: Array) -> Array:
    """Rounding error of each component of the slope ``q - K v``."""
    noise: Array = rounding(len(v)) * (size + np.abs(K) @ np.abs(v))
    return noise


def _block_pivoting(K: Array, q: Array, size: Array, support: Mask, definite: bool) -> Array | None:
    """Exchange all infeasible variables at once; None if that cannot be relied on."""
    fewest, patience = len(q) + 1, _BLOCK_PATIENCE
    while True:
        index = np.flatnonzero(support)
        block = K[index[:, None], index]
        if not (definite or is_safely_definite(block)):
            return None
        v = np.zeros_like(q)
        v[index] = solve_symmetric(block, q[index])
        infeasible = np.where(support, v <= 0, q - K @ v > _noise(K, size, v))
        count = int(np.count_nonzero(infeasible))
        if count == 0:
            return v
        if count < fewest:
            fewest, patience = count, _BLOCK_PATIENCE
        elif patience == 0:
            return None
        else:
            patience -= 1
        support = support ^ infeasible


def _active_set(K: Array, q: Array, size: Array, start: Array) -> Array:
    """Let one variable in at a time, as Lawson and Hanson do, from a feasible ``start``."""
    limit = _MAX_EXCHANGES * len(q)
    v = _descend(K, q, start, start > 0)
    spent = np.zeros(len(q), dtype=np.bool_)
    for _ in range(limit):
        slope = q - K @ v
        gain = np.where((v > 0) | spent, -np.inf, slope - _noise(K, size, v))
        entering = int(gain.argmax())
        if gain[entering] <= 0:
            return v
        v, objective_gain = _enter(K, q, size, v, entering, float(slope[entering]))
        # A gain below the rounding error of the objective cannot prove progress, so a variable
        # may claim one only once; that is what rules out cycling.
        if objective_gain <= rounding(len(q)) * float(size @ v):
            spent[entering] = True
    warn_not_converged("The nonnegative quadratic solver", limit)
    return v


def _enter(
    K: Array, q: Array, size: Array, v: Array, entering: int, slope: float
) -> tuple[Array, float]:
    """Let one variable in; the new point and the decrease of the objective it promises."""
    index = np.flatnonzero(v)
    mix = solve_symmetric(K[index[:, None], index], K[index, entering])
    pivot = float(K[entering, entering] - K[entering, index] @ mix)
    noise = rounding(len(q)) * float(1 + np.abs(mix).sum()) ** 2
    support = v > 0
    support[entering] = True
    if pivot > noise:
        return _descend(K, q, v, support), 0.5 * slope**2 / pivot
    # The entering column is a combination of the support: along the ray that trades them the
    # objective falls linearly, until the first variable of the support reaches zero. A slope that
    # a remainder of rounding size could explain is none.
    leaving = np.flatnonzero(mix > 0)
    if len(leaving) == 0 or slope <= noise**0.5 * float(size.max()):
        return v, 0.0
    ratios = v[index[leaving]] / mix[leaving]
    step = float(ratios.min())
    v = v.copy()
    v[index] = np.maximum(v[index] - step * mix, 0.0)
    v[entering] = step
    out = index[leaving[int(ratios.argmin())]]
    v[out], support[out] = 0.0, False
    return _descend(K, q, v, support & (v > 0)), step * slope


def _descend(K: Array, q: Array, v: Array, support: Mask) -> Array:
    """Move from ``v`` to the minimiser on ``support``, dropping what would turn negative."""
    index = np.flatnonzero(support)
    x = v[index]
    result = np.zeros_like(v)
    while len(index):
        target = solve_symmetric(K[index[:, None], index], q[index])
        blocking = np.flatnonzero(target <= 0)
        if len(blocking) == 0:
            result[index] = target
            break
        steps = x[blocking] / (x[blocking] - target[blocking] + _TINY)
        step = float(steps.min())
        x += step * (target - x)
        x[blocking[steps <= step]] = 0.0
        index, x = index[x > 0], x[x > 0]
    return result
