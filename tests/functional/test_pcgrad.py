from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.functional import pcgrad_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

KINDS = [kind for kind in hard_matrices(2) if kind != "zero row"]


def random_order(m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(m, generator=generator) for _ in range(m)])


@pytest.mark.parametrize("m", [2, 5, 40])
@pytest.mark.parametrize("kind", hard_matrices(2))
def test_direction_is_that_of_the_plain_loops(kind: str, m: int) -> None:
    jacobian, order = hard_matrices(m)[kind], random_order(m)
    weights = pcgrad_weights(gram(jacobian), order)
    assert gap(weights @ jacobian, reference.pcgrad(jacobian, order), jacobian, weights) <= 1e-8


def test_the_order_counts() -> None:
    jacobian = hard_matrices(5)["conflicting"]
    first, second = (pcgrad_weights(gram(jacobian), random_order(5, seed)) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_without_conflict_it_is_the_sum() -> None:
    assert pcgrad_weights(torch.eye(3) + 1, random_order(3)).tolist() == [1, 1, 1]


def test_opposed_rows_cancel() -> None:
    g = torch.tensor([3.0, -1.0], dtype=torch.float64)
    jacobian = torch.stack([g, -2 * g])
    assert not (pcgrad_weights(gram(jacobian), random_order(2)) @ jacobian).any()


def test_mean_is_the_sum_over_m() -> None:
    K, order = gram(hard_matrices(4)["generic"]), random_order(4)
    torch.testing.assert_close(pcgrad_weights(K, order, "mean"), pcgrad_weights(K, order) / 4)


def test_one_task() -> None:
    assert pcgrad_weights(torch.tensor([[2.0]]), torch.tensor([[0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), r"`order` must have shape \[2, 2\], got \[2, 3\]\."),
        (torch.zeros(2, 2), r"`order` must hold integers, got torch\.float32\."),
        (torch.tensor([[0, 1], [1, 1]]), r"permutation of range\(2\) .* got \[1, 1\] in row 1\."),
    ],
)
def test_bad_order_is_refused(order: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pcgrad_weights(torch.eye(2), order)


def test_bad_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match=r'`reduction` must be "sum" or "mean", got \'max\'\.'):
        pcgrad_weights(torch.eye(2), random_order(2), "max")  # type: ignore[arg-type]
