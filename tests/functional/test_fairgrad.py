from __future__ import annotations

import math

import pytest
import torch

from lightning_flatmtl.functional import fairgrad_weights, nash_weights
from tests.functional.matrices import gram, hard_matrices
from tests.functional.test_nash_mtl import NEAR, SOLVABLE


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("m", [1, 2, 9, 40])
@pytest.mark.parametrize("kind", SOLVABLE + NEAR)
def test_the_equation_holds_in_every_component(kind: str, m: int, alpha: float) -> None:
    jacobian = hard_matrices(max(m, 2))[kind][:m]
    weights = fairgrad_weights(gram(jacobian), alpha)
    assert (weights > 0).all()
    # Slopes are compared with their terms: with scales apart they are small differences.
    slopes, wanted = jacobian @ (weights @ jacobian), weights ** (-1 / alpha)
    terms = gram(jacobian).abs() @ weights
    assert ((slopes - wanted).abs() <= 1e-9 * wanted + 1e-14 * terms).all()


@pytest.mark.parametrize("kind", SOLVABLE)
def test_alpha_one_is_the_nash_solution(kind: str) -> None:
    K = gram(hard_matrices(6)[kind])
    torch.testing.assert_close(fairgrad_weights(K, 1.0), nash_weights(K), rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 2.0, 50.0])
@pytest.mark.parametrize("kind", ["opposed rows", "opposed rows, unequal", "all zero"])
@pytest.mark.parametrize("m", [2, 9])
def test_without_an_agreement_there_is_no_update(kind: str, m: int, alpha: float) -> None:
    assert not fairgrad_weights(gram(hard_matrices(m)[kind]), alpha).any()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 50.0, 1000.0])
def test_extreme_degrees_of_fairness(alpha: float) -> None:
    jacobian = hard_matrices(4)["agreeing"]
    weights = fairgrad_weights(gram(jacobian), alpha)
    ratio = (jacobian @ (weights @ jacobian)) / weights ** (-1 / alpha)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-8, atol=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"`alpha` must be in \(0, inf\), got {alpha}\."):
        fairgrad_weights(torch.eye(2), alpha)
