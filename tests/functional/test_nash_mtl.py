from __future__ import annotations

import pytest
import torch

from lightning_flatmtl.functional import ConvergenceWarning, _barrier, nash_weights
from tests.functional.matrices import gram, hard_matrices

SOLVABLE = ["generic", "agreeing", "conflicting", "scales", "equal rows", "parallel rows"]
NEAR = ["near-parallel", "near-parallel, scales", "dependent, agreeing", "dependent, scales"]


@pytest.mark.parametrize("m", [1, 2, 9, 40])
@pytest.mark.parametrize("kind", SOLVABLE + NEAR)
def test_the_equation_holds_in_every_component(kind: str, m: int) -> None:
    jacobian = hard_matrices(max(m, 2))[kind][:m]
    weights = nash_weights(gram(jacobian))
    assert (weights > 0).all()
    products = weights * (jacobian @ (weights @ jacobian))
    torch.testing.assert_close(products, torch.ones_like(products), rtol=1e-9, atol=0)


def test_the_direction_has_the_norm_sqrt_m() -> None:
    jacobian = hard_matrices(7)["scales"]
    norm = (nash_weights(gram(jacobian)) @ jacobian).norm()
    torch.testing.assert_close(norm, torch.tensor(7.0, dtype=torch.float64).sqrt())


def test_nearly_opposed_rows_have_a_long_solution() -> None:
    jacobian = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3]], dtype=torch.float64)
    weights = nash_weights(gram(jacobian))
    torch.testing.assert_close(weights, torch.full_like(weights, 1e3 / 2**0.5), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["opposed rows", "opposed rows, unequal", "all zero"])
@pytest.mark.parametrize("m", [2, 9, 40])
def test_without_an_agreement_there_is_no_update(kind: str, m: int) -> None:
    assert not nash_weights(gram(hard_matrices(m)[kind])).any()


def test_zero_rows_are_left_out() -> None:
    weights = nash_weights(torch.diag(torch.tensor([0.0, 4.0, 1.0])))
    torch.testing.assert_close(weights, torch.tensor([0, 0.5, 1], dtype=torch.float64))


def test_running_out_of_steps_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_barrier, "_MAX_STEPS", 1)
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 iterations"):
        weights = nash_weights(gram(hard_matrices(5)["generic"]))
    assert (weights > 0).all()
