from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.functional import upgrad_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

KINDS = list(hard_matrices(2))


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_exact_one(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = upgrad_weights(gram(jacobian))
    assert gap(weights @ jacobian, reference.upgrad(jacobian), jacobian, weights) <= 1e-8


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_no_task_is_harmed(kind: str, m: int) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = upgrad_weights(gram(jacobian))
    direction = weights @ jacobian
    norms = jacobian.norm(dim=1)
    assert (weights >= 0).all()
    assert (jacobian @ direction >= -1e-10 * norms * (weights @ norms)).all()


def test_preference_weighs_the_projections() -> None:
    jacobian = hard_matrices(4)["conflicting"]
    preference = torch.tensor([0.1, 2.0, 0.0, 1.0])
    weights = upgrad_weights(gram(jacobian), preference)
    expected = reference.upgrad(jacobian, preference.tolist())
    assert gap(weights @ jacobian, expected, jacobian, weights) <= 1e-8


def test_without_conflict_it_is_the_mean() -> None:
    assert upgrad_weights(torch.eye(4) + 1).tolist() == [0.25] * 4


def test_opposed_rows_cancel() -> None:
    g = torch.tensor([3.0, -1.0], dtype=torch.float64)
    jacobian = torch.stack([g, -2 * g])
    assert not (upgrad_weights(gram(jacobian)) @ jacobian).any()


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (torch.ones(3), r"`preference` must have shape \[2\], got \[3\]\."),
        (torch.tensor([1.0, -1.0]), r"`preference` must be in \[0, inf\), got -1\.0 at 1\."),
        (torch.tensor([math.nan, 1.0]), r"`preference` must be in \[0, inf\), got nan at 0\."),
    ],
)
def test_bad_preference_is_refused(preference: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upgrad_weights(torch.eye(2), preference)
