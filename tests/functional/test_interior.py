from __future__ import annotations

import numpy as np
import pytest

from lightning_flatmtl.functional import _interior
from lightning_flatmtl.functional._interior import interior_points
from lightning_flatmtl.functional._nonnegative import _active_set
from tests.functional.matrices import hard_matrices

KINDS = [kind for kind in hard_matrices(2) if kind not in ("zero row", "all zero")]


def cosines(kind: str, m: int) -> np.ndarray:
    jacobian = hard_matrices(m)[kind].numpy()
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    return units @ units.T


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_points_are_as_good_as_one_exchange_at_a_time(kind: str, m: int) -> None:
    K = cosines(kind, m)
    points, unsolved = interior_points(K, -K)
    assert (points >= 0).all()
    # Of a row with its exact opposite arbitrarily large amounts are solutions.
    assert unsolved.sum() <= (2 if "opposed" in kind else 0)
    for q, v in zip(-K[~unsolved], points[~unsolved], strict=True):
        one = _active_set(K, q, np.abs(q), np.zeros(m))
        size = abs(_objective(K, q, one)) + abs(q) @ one
        assert _objective(K, q, v) <= _objective(K, q, one) + 1e-12 * size


def test_the_size_of_the_linear_term_changes_only_that_of_the_point() -> None:
    K = cosines("conflicting", 5)
    points, _ = interior_points(K, -K)
    larger, unsolved = interior_points(K, -1e80 * K)
    assert not unsolved.any()
    np.testing.assert_allclose(larger, 1e80 * points, rtol=1e-12)


def test_what_is_not_solved_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_interior, "_MAX_STEPS", 2)
    K = cosines("conflicting", 5)
    points, unsolved = interior_points(K, -K)
    assert unsolved.all()
    assert np.isfinite(points).all()


def test_points_larger_than_asked_for_are_given_up() -> None:
    K = cosines("conflicting", 5)
    points, unsolved = interior_points(K, -K)
    assert not unsolved.any()
    for share in (0.5, 100.0):
        _, given_up = interior_points(K, -K, share * float(points.sum(axis=1).max()))
        assert given_up.any() == (share < 1)


def test_a_system_without_a_solution_ends_the_search() -> None:
    K = np.array([[-(1.0 + _interior.rounding(1) / 8)]])
    points, unsolved = interior_points(K, np.ones((1, 1)))
    assert points.tolist() == [[0.0]]
    assert unsolved.tolist() == [True]


def _objective(K: np.ndarray, q: np.ndarray, v: np.ndarray) -> float:
    return float(0.5 * v @ K @ v - q @ v)
