from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.functional import gradvac_weights, pcgrad_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices
from tests.functional.test_pcgrad import random_order

KINDS = ["generic", "agreeing", "conflicting", "scales", "near-parallel", "parallel rows"]


def random_targets(m: int, size: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    return size * (2 * torch.rand(m, m, dtype=torch.float64, generator=generator) - 1)


@pytest.mark.parametrize("m", [2, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_result_is_that_of_the_plain_loops(kind: str, m: int) -> None:
    jacobian, order, targets = hard_matrices(m)[kind], random_order(m), random_targets(m)
    weights, cosines = gradvac_weights(gram(jacobian), order, targets)
    direction, expected = reference.gradvac(jacobian, order, targets)
    assert gap(weights @ jacobian, direction, jacobian, weights) <= 1e-8
    torch.testing.assert_close(cosines, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["generic", "conflicting", "scales", "zero row"])
def test_targets_of_zero_are_pcgrad(kind: str) -> None:
    K, order = gram(hard_matrices(6)[kind]), random_order(6)
    weights, _ = gradvac_weights(K, order, torch.zeros(6, 6))
    torch.testing.assert_close(weights, pcgrad_weights(K, order), rtol=1e-9, atol=0)


def test_two_tasks_arrive_at_the_target() -> None:
    jacobian = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.6], [-1.0, 0.0]])
    weights, cosines = gradvac_weights(gram(jacobian), random_order(2), targets)
    moved = weights @ jacobian - jacobian[1]  # task 2 is on target
    assert math.isclose(moved[1] / moved.norm(), 0.6, rel_tol=1e-7)
    assert cosines[0, 1] == 0


def test_where_no_cosine_is_defined_the_target_is_returned() -> None:
    targets = random_targets(3)
    K = torch.diag(torch.tensor([0.0, 1.0, 1.0]))
    weights, cosines = gradvac_weights(K, random_order(3), targets)
    undefined = torch.eye(3, dtype=torch.bool)
    undefined[0] = undefined[:, 0] = True
    assert torch.equal(cosines[undefined], targets[undefined])
    assert (cosines[~undefined] == 0).all()
    assert weights.isfinite().all()


def test_a_gradient_that_cancelled_is_left_alone() -> None:
    g, h = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    jacobian = torch.stack([g, -g, h])
    order = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    targets = torch.zeros(3, 3)
    targets[0, 2] = targets[1, 2] = 0.5
    weights, cosines = gradvac_weights(gram(jacobian), order, targets)
    assert cosines[0].tolist() == [0, -1, 0.5]
    # h loses its part along g, and the opposed pair has nothing left.
    torch.testing.assert_close(weights @ jacobian, torch.tensor([0, 0.8], dtype=torch.float64))


def test_parallel_rows_whose_target_rounds_to_one_stay_as_they_are() -> None:
    g = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.stack([g, 3 * g])
    for target in (1.0, 1.0 - 2**-53):
        weights, _ = gradvac_weights(
            gram(jacobian), random_order(2), torch.full((2, 2), target, dtype=torch.float64)
        )
        assert weights.tolist() == [1, 1]


def test_a_target_of_one_is_out_of_reach() -> None:
    weights, _ = gradvac_weights(torch.eye(2), random_order(2), torch.ones(2, 2))
    assert weights.tolist() == [1, 1]


def test_mean_is_the_sum_over_m() -> None:
    K, order, targets = gram(hard_matrices(4)["generic"]), random_order(4), random_targets(4)
    total, _ = gradvac_weights(K, order, targets)
    mean, _ = gradvac_weights(K, order, targets, "mean")
    torch.testing.assert_close(mean, total / 4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(2, 3), r"`targets` must have shape \[2, 2\], got \[2, 3\]\."),
        (torch.full((2, 2), 1.5), r"`targets` must be in \[-1, 1\], got 1\.5 at \[0, 0\]\."),
        (torch.full((2, 2), math.nan), r"`targets` must be in \[-1, 1\], got nan at \[0, 0\]\."),
    ],
)
def test_bad_targets_are_refused(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradvac_weights(torch.eye(2), random_order(2), targets)
