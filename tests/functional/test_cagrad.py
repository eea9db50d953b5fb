from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_flatmtl.functional import cagrad_weights, min_norm_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

KINDS = list(hard_matrices(2))


@pytest.mark.parametrize("c", [0.1, 0.4, 1.5])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_exact_one(kind: str, m: int, c: float) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = cagrad_weights(gram(jacobian), c, rescale=False)
    assert gap(weights @ jacobian, reference.cagrad(jacobian, c), jacobian, weights) <= 1e-8


@pytest.mark.parametrize("c", [1e-3, 0.4, 3.0])
@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_optimality_conditions(kind: str, m: int, c: float) -> None:
    """d = g0 + G'v, v >= 0, ||d - g0|| <= c ||g0||, and only the worst-off tasks have v_i > 0."""
    jacobian = hard_matrices(m)[kind]
    mean, norms = jacobian.mean(dim=0), jacobian.norm(dim=1)
    weights = cagrad_weights(gram(jacobian), c, rescale=False)
    v, direction = weights - 1 / m, weights @ jacobian
    radius = c * mean.norm()
    step = (direction - mean).norm()
    assert (v >= -1e-15).all()
    assert step <= radius * (1 + 1e-8)
    slopes, tolerance = jacobian @ direction, 1e-8 * norms * (mean.norm() + radius)
    active = torch.nonzero(v * norms > 1e-8 * radius).flatten()
    if len(active):
        # The shortest row tells the common slope with the least rounding error.
        level = slopes[active[norms[active].argmin()]]
        assert (slopes[active] - level <= tolerance[active]).all()
        assert (slopes - level >= -tolerance - 1e-14 * norms.max() * direction.norm()).all()
    if step < radius * (1 - 1e-8):  # only where no direction serves every task
        assert min_norm_is_zero(jacobian)
        assert (slopes >= -tolerance).all()


def min_norm_is_zero(jacobian: Tensor) -> bool:
    weights = min_norm_weights(gram(jacobian))
    return bool((weights @ jacobian).norm() <= 1e-7 * (weights @ jacobian.norm(dim=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_radius_zero_is_the_mean(kind: str) -> None:
    weights = cagrad_weights(gram(hard_matrices(5)[kind]), c=0.0)
    assert weights.tolist() == [1 / 5] * 5


def test_equal_gradients_are_lengthened_by_the_radius() -> None:
    K = torch.ones(3, 3)
    assert math.isclose(cagrad_weights(K, c=0.4, rescale=False).sum(), 1.4, rel_tol=1e-14)
    assert math.isclose(cagrad_weights(K, c=0.4).sum(), 1.4 / 1.16, rel_tol=1e-14)


def test_one_task() -> None:
    assert math.isclose(cagrad_weights(torch.tensor([[4.0]]), c=0.5, rescale=False), 1.5)


def test_zero_mean_gives_the_zero_direction() -> None:
    g = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    jacobian = torch.stack([g, -g])
    weights = cagrad_weights(gram(jacobian), c=0.4)
    # Equal weights: of the sum itself, processors with fused multiply-add round one product only.
    assert weights[0] == weights[1]
    assert (weights @ jacobian).abs().max() <= 2**-53 * weights[0] * jacobian.abs().max()


def test_opposed_rows_get_the_projection_of_the_mean_on_the_dual_cone() -> None:
    # The mean is (1, 1); neither of the opposed tasks may lose, and 1 is within the radius.
    jacobian = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    direction = cagrad_weights(gram(jacobian), c=0.8, rescale=False) @ jacobian
    torch.testing.assert_close(direction, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_out_of_reach_of_the_dual_cone_the_worst_task_gets_most() -> None:
    jacobian = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    direction = cagrad_weights(gram(jacobian), c=0.1, rescale=False) @ jacobian
    expected = torch.tensor([1 - 0.1 * math.sqrt(2), 1.0], dtype=torch.float64)
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_rows_almost_on_a_line(c: float) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        jacobian = torch.from_numpy(rng.integers(-5, 6, (5, 3)) * np.array([1, 1e-6, 1e-6]))
        mean = jacobian.mean(dim=0)
        # It converges: a ConvergenceWarning is an error here.
        direction = cagrad_weights(gram(jacobian), c, rescale=False) @ jacobian
        # What is across the line enters the Gram as 1e-12, of which four digits are there.
        assert (direction - mean).norm() <= c * mean.norm() * (1 + 1e-2)
        slopes, tolerance = jacobian @ direction, 1e-7 * jacobian.norm() * direction.norm()
        assert slopes.min() >= (jacobian @ mean).min() - tolerance


@pytest.mark.parametrize("c", [-0.1, math.nan, math.inf])
def test_bad_radius_is_refused(c: float) -> None:
    with pytest.raises(ValueError, match=rf"`c` must be in \[0, inf\), got {c}\."):
        cagrad_weights(torch.eye(2), c)
