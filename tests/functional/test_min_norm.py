from __future__ import annotations

import pytest
import torch

from lightning_flatmtl.functional import min_norm_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

KINDS = list(hard_matrices(2))


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_exact_min_norm_point(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = min_norm_weights(gram(jacobian))
    assert gap(weights @ jacobian, reference.min_norm(jacobian), jacobian, weights) <= 1e-8


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_lie_on_the_simplex_and_no_task_is_behind(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = min_norm_weights(gram(jacobian))
    direction = weights @ jacobian
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    # Optimal means that no vertex lies closer: g_i' d >= ||d||^2 for all i.
    behind = direction @ direction - jacobian @ direction
    terms = jacobian.norm(dim=1) * (weights @ jacobian.norm(dim=1).double())
    assert (behind <= 1e-8 * terms).all()


def test_two_rows_follow_the_closed_formula() -> None:
    K = torch.tensor([[2.0, -1.0], [-1.0, 5.0]], dtype=torch.float64)
    share = (5 + 1) / (2 + 5 + 2)
    torch.testing.assert_close(
        min_norm_weights(K), torch.tensor([share, 1 - share], dtype=torch.float64)
    )


def test_a_short_row_in_front_takes_all_the_weight() -> None:
    K = torch.tensor([[1.0, 2.0], [2.0, 9.0]])
    assert min_norm_weights(K).tolist() == [1, 0]


def test_zero_rows_share_the_weight() -> None:
    K = torch.diag(torch.tensor([0.0, 3.0, 0.0]))
    assert min_norm_weights(K).tolist() == [0.5, 0, 0.5]


def test_one_task_has_weight_one() -> None:
    assert min_norm_weights(torch.tensor([[4.0]])).tolist() == [1]
    assert min_norm_weights(torch.tensor([[0.0]])).tolist() == [1]
