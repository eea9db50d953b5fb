from __future__ import annotations

import mpmath
import numpy as np
import pytest

from lightning_flatmtl.functional import ConvergenceWarning, _nonnegative
from lightning_flatmtl.functional._nonnegative import _active_set, solve_nonnegative
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
