from __future__ import annotations

import torch

from lightning_flatmtl.functional import conflict_rate, cosine_similarity
from tests.functional.matrices import gram, hard_matrices


def test_cosines() -> None:
    jacobian = hard_matrices(6)["scales"]
    expected = torch.nn.functional.cosine_similarity(jacobian[:, None], jacobian, dim=-1)
    torch.testing.assert_close(cosine_similarity(gram(jacobian)), expected)


def test_cosines_of_parallel_rows_stay_within_one() -> None:
    g = torch.rand(1000, dtype=torch.float64)
    cosines = cosine_similarity(gram(torch.stack([g, 3 * g, -7 * g])))
    assert cosines.abs().max() == 1


def test_a_zero_row_has_cosine_zero() -> None:
    cosines = cosine_similarity(torch.diag(torch.tensor([0.0, 2.0])))
    assert cosines.tolist() == [[0, 0], [0, 1]]


def test_conflict_rate_counts_pairs() -> None:
    K = torch.tensor([[1.0, -0.1, 0.2], [-0.1, 1.0, -0.3], [0.2, -0.3, 1.0]])
    torch.testing.assert_close(conflict_rate(K), torch.tensor(2 / 3, dtype=torch.float64))


def test_conflict_rate_of_one_task_and_of_zero_rows_is_zero() -> None:
    assert conflict_rate(torch.ones(1, 1)) == 0
    assert conflict_rate(torch.zeros(3, 3)) == 0
