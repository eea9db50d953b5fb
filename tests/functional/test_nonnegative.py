from __future__ import annotations

import mpmath
import numpy as np
import pytest

from lightning_flatmtl.functional import ConvergenceWarning, _nonnegative
from lightning_flatmtl.functional._nonnegative import (
    _active_set,
    solve_nonnegative,
    solve_nonnegative_many,
)
from tests.functional import reference
from tests.functional.matrices import hard_matrices

KINDS = [kind for kind in hard_matrices(2) if kind not in ("zero row", "all zero")]


def problem(kind: str, m: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and a linear term that keeps the problem bounded: in range, plus a level <= 0."""
    jacobian = hard_matrices(m)[kind].numpy()
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    rng = np.random.default_rng(m)
    return units @ units.T, units @ rng.standard_normal(units.shape[1]) + level


@pytest.mark.parametrize("level", [0.0, -0.3])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_both_methods_find_the_minimum(kind: str, m: int, level: float) -> None:
    unit = reference.Unit(hard_matrices(m)[kind])
    target = np.random.default_rng(m).standard_normal(len(unit.units[0]))
    exact_q = [mpmath.fdot(row, map(mpmath.mpf, target)) + mpmath.mpf(level) for row in unit.units]
    exact = np.array(reference.nonnegative(unit.cosines, exact_q), dtype=float)
    K, q = np.array(unit.cosines, dtype=float), np.array(exact_q, dtype=float)
    best = _objective(K, q, exact)
    for v in (solve_nonnegative(K, q), _active_set(K, q, np.abs(q), np.zeros(m))):
        assert (v >= 0).all()
        assert abs(_objective(K, q, v) - best) <= 1e-12 * (abs(best) + abs(q) @ v)


@pytest.mark.parametrize("m", [9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_changes_nothing(kind: str, m: int) -> None:
    K, q = problem(kind, m, -0.1)
    start = solve_nonnegative(K, q + 0.05)
    cold, warm = solve_nonnegative(K, q), solve_nonnegative(K, q, start=start)
    np.testing.assert_allclose(K @ warm, K @ cold, rtol=1e-7, atol=1e-9 * np.abs(q).max())


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_are_as_good_as_one_by_one(kind: str, m: int) -> None:
    K, _ = problem(kind, m, 0.0)
    for q, v in zip(-K, solve_nonnegative_many(K, -K), strict=True):
        assert (v >= 0).all()
        one = _active_set(K, q, np.abs(q), np.zeros(m))
        size = abs(_objective(K, q, one)) + abs(q) @ one
        assert _objective(K, q, v) <= _objective(K, q, one) + 1e-12 * size


def test_a_block_without_a_solution_is_left_over() -> None:
    # The ridge makes the second pivot exactly zero.
    K = np.diag([1.0, -_nonnegative.rounding(2) / 8])
    q = np.array([[1.0, 1e-300]])
    _, unsolved = _nonnegative._pivoting_many(K, q, q > 0, definite=False)
    assert unsolved.tolist() == [0]


def _near_singular(kind: str, rank: int, spread: float) -> np.ndarray:
    """Cosines of 40 rows that a few directions explain, but for small integers or noise."""
    rng = np.random.default_rng(2)
    if kind == "dependent":
        rows = rng.integers(-9, 10, (40, rank)).astype(float)
    else:
        rows = rng.standard_normal((40, rank)) @ rng.standard_normal((rank, 200))
        rows += spread * rng.standard_normal(rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


HARD_FOR_PIVOTING = [("dependent", 20, 0.0), ("noisy", 20, 1e-4), ("noisy", 20, 1e-6)]


@pytest.mark.parametrize(
    ("kind", "rank", "spread"),
    [*HARD_FOR_PIVOTING, ("noisy", 2, 1e-4), ("noisy", 10, 1e-4), ("noisy", 10, 1e-6)],
)
def test_near_singular_problems_rarely_need_one_exchange_at_a_time(
    kind: str, rank: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly dependent rows took hundreds of exchanges, a hundred milliseconds in all."""
    K = _near_singular(kind, rank, spread)
    entered, enter = [0], _nonnegative._enter

    def counted(*args):
        entered[0] += 1
        return enter(*args)

    monkeypatch.setattr(_nonnegative, "_enter", counted)
    solve_nonnegative_many(K, -K)
    assert entered[0] <= 40


@pytest.mark.parametrize(("kind", "rank", "spread"), HARD_FOR_PIVOTING)
def test_what_pivoting_cannot_do_comes_out_as_good(kind: str, rank: int, spread: float) -> None:
    K = _near_singular(kind, rank, spread)
    for q, v in zip(-K, solve_nonnegative_many(K, -K), strict=True):
        one = _active_set(K, q, np.abs(q), np.zeros(40))
        size = abs(_objective(K, q, one)) + abs(q) @ one
        assert _objective(K, q, v) <= _objective(K, q, one) + 1e-12 * size


def test_the_last_digits_of_the_cosines_are_not_traded_for_large_weights() -> None:
    """Rows opposed to 1e-7: what of their sum is not rounding takes weights of 1e7 to use."""
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((9, 6))
    rows[:4] = -rows[5:] + 1e-7 * rng.standard_normal((4, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    K = rows @ rows.T
    np.fill_diagonal(K, 1.0)
    assert solve_nonnegative_many(K, -K).sum(axis=1).max() <= 256
    solutions, left_over = _nonnegative._singular_many(K, -K)
    assert solutions.sum(axis=1).max() <= 256
    assert len(left_over) > 0


def test_parallel_columns_trade_places() -> None:
    # Equal unit rows with different demands: the column with the larger demand must win although
    # it depends on the one that is in already.
    K, q = np.ones((3, 3)), np.array([1.0, 3.0, 2.0])
    start = np.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(_active_set(K, q, q, start), [0, 3, 0])


def test_a_column_at_right_angles_stays_when_parallel_ones_trade_places() -> None:
    # The second column has no part in the first, whose copy with the larger demand enters.
    K = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    q, start = np.array([1.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(_active_set(K, q, q, start), [0, 1, 2])


def test_running_out_of_iterations_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nonnegative, "_MAX_EXCHANGES", 0)
    K, q = problem("dependent", 5, 0.0)
    with pytest.warns(ConvergenceWarning, match="did not converge in 0 iterations"):
        _active_set(K, q, np.abs(q), np.zeros(5))


def _objective(K: np.ndarray, q: np.ndarray, v: np.ndarray) -> float:
    return float(0.5 * v @ K @ v - q @ v)
