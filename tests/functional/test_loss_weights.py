"""Weights of the losses against the derivatives of the objectives that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad

from lightning_flatmtl import functional

L = torch.tensor([0.3, 2.0, 7.0, 1.0], dtype=torch.float64)
S = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
SMALL = torch.tensor([1e-310, 1.0], dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_gls_descends_on_the_geometric_mean() -> None:
    close(functional.gls_weights(L), grad(lambda x: x.prod() ** (1 / 4))(L))


def test_scale_invariant_descends_on_the_sum_of_logarithms() -> None:
    close(functional.scale_invariant_weights(L), grad(lambda x: x.log().sum())(L))


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("preference", [None, [1.0, 0.0, 0.5, 2.0]])
def test_stch_descends_on_the_smooth_maximum(mu: float, preference: list[float] | None) -> None:
    reference = torch.tensor([0.5, 0.5, 3.0, 9.0], dtype=torch.float64)
    powers = torch.tensor(preference or [1.0] * 4, dtype=torch.float64)

    def smooth_maximum(losses: Tensor) -> Tensor:
        return 4 * mu * (powers * (losses / reference).log() / mu).exp().sum().log()

    close(functional.stch_weights(L, reference, mu, preference), grad(smooth_maximum)(L))


def test_stch_nears_the_maximum() -> None:
    assert functional.stch_weights(L, torch.ones(4), mu=1e-3).tolist() == [0, 0, 4 / 7.0, 0]


@pytest.mark.parametrize("half", [False, True])
def test_uncertainty_descends_on_its_objective(half: bool) -> None:
    def objective(losses: Tensor, s: Tensor) -> Tensor:
        return ((-s).exp() * losses + s).sum() / (2 if half else 1)

    close(functional.uncertainty_weights(S, half), grad(objective)(L, S))
    close(functional.uncertainty_gradient(S, L, half), grad(objective, argnums=1)(L, S))


def test_imtl_l_descends_on_its_objective() -> None:
    def objective(losses: Tensor, s: Tensor) -> Tensor:
        return (s.exp() * losses - s).sum()

    close(functional.imtl_l_weights(S), grad(objective)(L, S))
    close(functional.imtl_l_gradient(S, L), grad(objective, argnums=1)(L, S))
    close(functional.imtl_l_gradient(-L.log(), L), torch.zeros(4, dtype=torch.float64))


def test_softmax_weights_are_positive_with_the_mean_one() -> None:
    expected = [4 * math.exp(s) / sum(math.exp(t) for t in S.tolist()) for s in S.tolist()]
    close(functional.softmax_weights(S), torch.tensor(expected, dtype=torch.float64))
    assert functional.softmax_weights([1000.0, -1000.0]).tolist() == [2, 0]


def test_dwa_follows_the_rates() -> None:
    newer, older = [0.5, 1.0, -3.0, 5.0], [1.0, 4.0, 2.0, 0.0]
    powers = [math.exp(rate / 0.7) for rate in (0.5, 0.25, -1.5, 1.0)]
    expected = [4 * power / sum(powers) for power in powers]
    close(functional.dwa_weights(newer, older, 0.7), torch.tensor(expected, dtype=torch.float64))


def test_famo_weighs_logarithms_and_their_sum_is_one() -> None:
    # The direction of sum_i z_i log L_i, scaled.
    direction = grad(lambda x: (S.softmax(0) * x.log()).sum())(L)
    close(functional.famo_weights(S, L), direction / direction.sum())


def test_famo_moves_along_the_published_gradient() -> None:
    after = torch.tensor([0.2, 1.9, 8.0, 0.1], dtype=torch.float64)
    # The published code: autograd.grad(softmax(w), w, grad_outputs=delta).
    expected = torch.func.vjp(lambda s: s.softmax(0), S)[1](L.log() - after.log())[0]
    close(functional.famo_gradient(S, L, after), expected)
    close(functional.famo_gradient(S, L, 0.5 * L), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_descends_on_its_objective_with_constant_targets(alpha: float) -> None:
    rows = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    progress = torch.tensor([0.9, 0.1, 2.0, 0.5], dtype=torch.float64)

    def norms(z: Tensor) -> Tensor:
        return (4 * z.softmax(0)[:, None] * rows).norm(dim=1)

    targets = norms(S).mean() * (progress / progress.mean()) ** alpha
    expected = grad(lambda z: (norms(z) - targets).abs().sum())(S)
    close(
        functional.gradnorm_gradient(rows @ rows.T, functional.softmax_weights(S), progress, alpha),
        expected,
    )


def test_losses_that_have_no_inverse_count_as_the_least_that_has() -> None:
    assert functional.scale_invariant_weights(SMALL).tolist() == [1 / 1e-300, 1.0]
    for weights in (functional.gls_weights(SMALL), functional.famo_weights([0.0, 0.0], SMALL)):
        assert weights.isfinite().all()
    assert functional.stch_weights(SMALL, SMALL).isfinite().all()
    assert functional.famo_gradient([0.0, 0.0], SMALL, SMALL).tolist() == [0, 0]


VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "gls": functional.gls_weights,
    "scale_invariant": functional.scale_invariant_weights,
    "stch": lambda x: functional.stch_weights(x, torch.ones(4)),
    "stch, reference": lambda x: functional.stch_weights(L, x),
    "famo": lambda x: functional.famo_weights(S, x),
    "uw_so": functional.uw_so_weights,
    "go4align": lambda x: functional.go4align_weights(x, S),
    "famo, before": lambda x: functional.famo_gradient(S, x, L),
    "famo, after": lambda x: functional.famo_gradient(S, L, x),
    "gradnorm": lambda x: functional.gradnorm_gradient(torch.eye(4), torch.ones(4), x),
    "uncertainty": functional.uncertainty_weights,
    "uncertainty, losses": lambda x: functional.uncertainty_gradient(S, x),
    "imtl_l": functional.imtl_l_weights,
    "imtl_l, losses": lambda x: functional.imtl_l_gradient(S, x),
    "go4align, risks": lambda x: functional.go4align_weights(L, x),
    "ldc_mtl": lambda x: functional.ldc_mtl_weights(x, L),
    "ldc_mtl, losses": lambda x: functional.ldc_mtl_gradient(S, x),
    "softmax": functional.softmax_weights,
    "dwa": lambda x: functional.dwa_weights(x, L),
    "famo, scores": lambda x: functional.famo_weights(x, L),
}
ABOVE_ZERO = list(VECTORS)[:10]


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_any_type_give_the_same_in_float64_and_bad_ones_are_refused(name: str) -> None:
    function, values = VECTORS[name], [0.5, 1.0, 2.0, 0.25]
    expected = function(torch.tensor(values, dtype=torch.float64))
    assert expected.dtype == torch.float64
    assert expected.isfinite().all()
    for given in (values, torch.tensor(values, dtype=torch.bfloat16, requires_grad=True)):
        assert torch.equal(function(given), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be in .* inf\), got nan at 1"):
        function(torch.tensor([1.0, math.nan, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"must have shape \[.*, got \[2, 2\]"):
        function(torch.ones(2, 2))
    if name in ABOVE_ZERO:
        with pytest.raises(ValueError, match=r"must be in \(0, inf\), got 0.0 at 2"):
            function(torch.tensor([1.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_numbers_out_of_their_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"`mu` must be in \(0, inf\), got"):
        functional.stch_weights(L, L, mu=bad)
    with pytest.raises(ValueError, match=r"`temperature` must be in \(0, inf\), got"):
        functional.dwa_weights(L, L, bad)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, inf\), got"):
        functional.gradnorm_gradient(torch.eye(4), L, L, bad)
    with pytest.raises(ValueError, match=r"`preference` must be in \[0, inf\), got"):
        functional.stch_weights(L, L, preference=[1.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"`weights` must be in \[0, inf\), got"):
        functional.gradnorm_gradient(torch.eye(4), [1.0, bad, 1.0, 1.0], L)
    with pytest.raises(ValueError, match=r"`scores` must have shape \[4\], got \[3\]"):
        functional.famo_weights(S[:3], L)
