"""What all functions on a Gram share: checks, types, symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_flatmtl import functional
from tests.functional.matrices import gap, gram, hard_matrices

Solver = Callable[[Tensor], Tensor]

SOLVERS: dict[str, Solver] = {
    "min_norm_weights": functional.min_norm_weights,
    "mgda_weights": functional.mgda_weights,
    "sdmgrad_weights": functional.sdmgrad_weights,
    "db_mtl_weights": functional.db_mtl_weights,
    "conic_grad_weights": functional.conic_grad_weights,
    "ntkmtl_weights": functional.ntkmtl_weights,
    "cagrad_weights": lambda K: functional.cagrad_weights(K, 0.4),
    "imtl_g_weights": functional.imtl_g_weights,
    "config_weights": functional.config_weights,
    "nash_weights": functional.nash_weights,
    "fairgrad_weights": functional.fairgrad_weights,
    "upgrad_weights": functional.upgrad_weights,
    "aligned_mtl_weights": functional.aligned_mtl_weights,
    "gradvac_weights": lambda K: (
        functional.gradvac_weights(
            K, torch.arange(len(K)).repeat(len(K), 1), torch.full_like(K, 0.125)
        ).weights
    ),
    "pcgrad_weights": lambda K: functional.pcgrad_weights(
        K, torch.arange(len(K)).repeat(len(K), 1)
    ),
}
MEASURES: dict[str, Solver] = {
    "cosine_similarity": functional.cosine_similarity,
    "conflict_rate": functional.conflict_rate,
}
# The published order of PCGrad is part of its input, so it does not commute with permutations.
ORDER_FREE = [name for name in SOLVERS if name not in ("pcgrad_weights", "gradvac_weights")]
# How the direction of s * G follows from that of G: multiplied by s ** degree.
DEGREES = dict.fromkeys(SOLVERS, 1.0) | {"nash_weights": 0.0, "fairgrad_weights": -1 / 3}

everywhere = pytest.mark.parametrize("name", SOLVERS | MEASURES)

ORDER = torch.tensor([[0, 1], [0, 1]])
# The same of two tasks, for what is no tensor.
GIVEN: dict[str, Callable[[Any], object]] = {
    **SOLVERS,
    **MEASURES,
    "gradvac_weights": lambda K: functional.gradvac_weights(K, ORDER, torch.zeros(2, 2)),
    "pcgrad_weights": lambda K: functional.pcgrad_weights(K, ORDER),
}


def test_every_public_function_on_a_gram_is_in_a_table() -> None:
    functions = (name for name in functional.__all__ if name.endswith("_weights"))
    first = {
        name: next(iter(signature(getattr(functional, name)).parameters)) for name in functions
    }
    of_a_gram = {name for name, argument in first.items() if argument == "gram"}
    assert of_a_gram == set(SOLVERS)


@everywhere
@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0), (1, 2, 2)])
def test_a_gram_that_is_not_square_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`gram` must have shape \[m, m\] with m >= 1, got \["):
        (SOLVERS | MEASURES)[name](torch.ones(shape))


@everywhere
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gram_that_is_not_finite_is_refused(name: str, value: float) -> None:
    K = torch.eye(3)
    K[1, 2] = K[2, 1] = value
    with pytest.raises(ValueError, match=rf"`gram` must be finite, got {value} in row 1\."):
        (SOLVERS | MEASURES)[name](K)


@everywhere
def test_a_negative_diagonal_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"diagonal >= 0, got -1\.0 in row 2\."):
        (SOLVERS | MEASURES)[name](torch.diag(torch.tensor([1.0, 2.0, -1.0])))


UNREADABLE = [
    ([[1.0, 0.0], [0.0, 1.0]], "must be a tensor, got list"),
    (torch.eye(2).numpy(), "must be a tensor, got ndarray"),
    (
        torch.eye(2).to_sparse(),
        r"must be dense, got the layout torch.sparse_coo: use `.to_dense\(\)`",
    ),
    (torch.eye(2, device="meta"), "must have values, got a tensor on the meta device"),
    (torch.eye(2, dtype=torch.complex64), "must be real, got torch.complex64"),
]


@everywhere
@pytest.mark.parametrize(("given", "message"), UNREADABLE)
def test_a_gram_without_readable_entries_is_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^`gram` {message}"):
        GIVEN[name](given)


@pytest.mark.parametrize(("given", "message"), UNREADABLE)
def test_so_are_orders_and_targets(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^`order` {message}"):
        functional.pcgrad_weights(torch.eye(2), given)
    with pytest.raises(ValueError, match=f"^`targets` {message}"):
        functional.gradvac_weights(torch.eye(2), ORDER, given)


PREFERRING: dict[str, Callable[..., Tensor]] = {
    "upgrad": functional.upgrad_weights,
    "nash": functional.nash_weights,
    "aligned": lambda K, p: functional.aligned_mtl_weights(K, preference=p),
}


@pytest.mark.parametrize("name", PREFERRING)
def test_a_preference_may_be_a_list(name: str) -> None:
    K = torch.tensor([[2.0, -1.0], [-1.0, 4.0]])
    expected = PREFERRING[name](K, torch.tensor([0.25, 3.0]))
    for preference in ([0.25, 3.0], (0.25, 3)):
        assert torch.equal(PREFERRING[name](K, preference), expected)


@pytest.mark.parametrize("name", PREFERRING)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], r"must have shape \[2\], got \[1\]\."),
        ([1.0, -1.0], r"must be in [\[(]0, inf\), got -1\.0 at 1\."),
        ({"a": 1.0}, r"must be a tensor, got dict\."),
        (torch.ones(2, device="meta"), "must have values"),
    ],
)
def test_a_preference_that_is_none_is_refused(name: str, given: Any, message: str) -> None:
    for K in (torch.eye(2), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=f"^`preference` {message}"):
            PREFERRING[name](K, given)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float64_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    K = torch.tensor([[2.0, -1.0], [-1.0, 4.0]], dtype=dtype, requires_grad=True)
    before = K.detach().clone()
    weights = SOLVERS[name](K)
    assert weights.dtype == torch.float64
    assert weights.shape == (2,)
    assert not weights.requires_grad
    assert torch.equal(K, before)
    assert torch.equal(weights, SOLVERS[name](K.double()))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_hard_matrices_give_finite_weights(name: str, m: int) -> None:
    for jacobian in hard_matrices(m).values():
        assert SOLVERS[name](gram(jacobian)).isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("m", [7, 40])
def test_a_gram_that_rounding_made_indefinite_is_no_trouble(name: str, m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    jacobian = torch.randn(m, 2 * m, generator=generator)
    jacobian[0] = -jacobian[-1] + 1e-6 * torch.randn(2 * m, generator=generator)
    K = gram(jacobian)
    K[0, -1] = K[-1, 0] = K[0, -1] * (1 + 1e-7)
    assert torch.linalg.eigvalsh(K.double()).min() < 0
    assert SOLVERS[name](K).isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("m", [1, 5])
def test_a_zero_matrix_gives_the_zero_direction(name: str, m: int) -> None:
    weights = SOLVERS[name](torch.zeros(m, m))
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 8), seed=st.integers(0, 1000), exponent=st.integers(-26, 26))
def test_the_direction_follows_the_scale(name: str, m: int, seed: int, exponent: int) -> None:
    jacobian, scale = _random(m, seed), 2.0**exponent
    weights = SOLVERS[name](gram(jacobian))
    scaled = SOLVERS[name](gram(scale * jacobian))
    expected = weights * scale ** (DEGREES[name] - 1)
    torch.testing.assert_close(
        scaled, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", ORDER_FREE)
@settings(deadline=None, max_examples=15)
@given(m=st.integers(2, 8), seed=st.integers(0, 1000))
def test_the_direction_does_not_depend_on_the_order_of_tasks(name: str, m: int, seed: int) -> None:
    jacobian = _random(m, seed)
    shuffled = jacobian[torch.randperm(m, generator=torch.Generator().manual_seed(seed))]
    weights = SOLVERS[name](gram(jacobian))
    other = SOLVERS[name](gram(shuffled)) @ shuffled
    assert gap(other, weights @ jacobian, jacobian, weights) <= 1e-8


@pytest.mark.parametrize("name", ORDER_FREE)
@pytest.mark.parametrize("kind", ["dependent", "dependent, scales", "equal rows", "opposed rows"])
def test_nor_do_directions_of_dependent_rows(name: str, kind: str) -> None:
    jacobian = hard_matrices(6)[kind]
    shuffled = jacobian[torch.tensor([3, 5, 0, 1, 4, 2])]
    weights = SOLVERS[name](gram(jacobian))
    other = SOLVERS[name](gram(shuffled)) @ shuffled
    assert gap(other, weights @ jacobian, jacobian, weights) <= 1e-7


def _random(m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(m, m + 5, dtype=torch.float64, generator=generator)
    return jacobian * 10 ** (2 * torch.randn(m, 1, dtype=torch.float64, generator=generator))
