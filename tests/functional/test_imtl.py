from __future__ import annotations

import pytest
import torch

from lightning_flatmtl.functional import imtl_g_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

# Near-parallel rows are left out: the Gram itself holds only half of their digits.
KINDS = [kind for kind in hard_matrices(2) if not kind.startswith("near")]


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_exact_one(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = imtl_g_weights(gram(jacobian))
    assert gap(weights @ jacobian, reference.imtl_g(jacobian), jacobian, weights) <= 1e-8


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", ["generic", "agreeing", "conflicting", "scales"])
def test_projections_are_equal_and_weights_sum_to_one(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = imtl_g_weights(gram(jacobian))
    projections = (jacobian @ (weights @ jacobian)) / jacobian.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(m), rtol=1e-9, atol=0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("factor", [-1.0, -0.125, -1e6])
def test_opposed_rows_get_the_zero_direction(factor: float) -> None:
    g = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    jacobian = torch.stack([g, factor * g])
    weights = imtl_g_weights(gram(jacobian))
    assert (weights @ jacobian).norm() <= 1e-15 * (weights[0] * g).norm()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_parallel_rows_are_treated_alike() -> None:
    K = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(imtl_g_weights(K), torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))


def test_zero_rows_are_left_out() -> None:
    K = torch.diag(torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(imtl_g_weights(K), torch.tensor([0, 0.5, 0.5], dtype=torch.float64))


def test_all_zero_rows_share_the_weight() -> None:
    assert imtl_g_weights(torch.zeros(4, 4)).tolist() == [0.25] * 4


def test_weights_that_cannot_sum_to_one_are_zero() -> None:
    a = 0.65
    cosines = torch.tensor([[1, 0, a], [0, 1, a], [a, a, 1]], dtype=torch.float64)
    y = torch.linalg.solve(cosines, torch.ones(3, dtype=torch.float64))
    norms = torch.tensor([1.0, 1.0, -y[2] / (y[0] + y[1])], dtype=torch.float64)
    assert (norms > 0).all()
    assert imtl_g_weights(norms.outer(norms) * cosines).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("m", "rank"), [(4, 1), (4, 2), (6, 2), (9, 4)])
def test_rows_of_low_rank_get_the_limit_of_the_regularised_weights(m: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    norms = rows.norm(dim=1)
    units = rows / norms[:, None]
    # eps (C + eps I)^-1 tends to the projection on the kernel of C, the rows' left null space.
    ones = torch.ones(m, dtype=torch.float64)
    y = (ones - units @ (torch.linalg.pinv(units) @ ones)) / norms
    torch.testing.assert_close(imtl_g_weights(gram(rows)), y / y.sum(), rtol=1e-9, atol=1e-9)
