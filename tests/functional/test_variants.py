"""Methods that are another solver on changed rows: against that solver's proof on the rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import functional
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

KINDS = list(hard_matrices(2))
L = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)


def normalisers(rows: Tensor, normalization: str) -> Tensor:
    norms = rows.norm(dim=1)
    norms[norms == 0] = 1.0
    return {"none": torch.ones(3), "l2": norms, "loss": L, "loss+": L * norms}[normalization]


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("kind", KINDS)
def test_mgda_finds_the_min_norm_point_of_normalised_rows(kind: str, normalization: str) -> None:
    rows = hard_matrices(3)[kind]
    weights = functional.mgda_weights(gram(rows), normalization, L)  # type: ignore[arg-type]
    divided = rows / normalisers(rows, normalization)[:, None]
    assert gap(weights @ divided, reference.min_norm(divided), divided, weights) <= 1e-8


def test_mgda_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="`losses` must be given for 'loss', got None"):
        functional.mgda_weights(torch.eye(2), "loss")
    with pytest.raises(ValueError, match=r"`losses` must be in \(0, inf\), got -1.0 at 1"):
        functional.mgda_weights(torch.eye(2), "loss+", [1.0, -1.0])
    with pytest.raises(ValueError, match="`normalization` must be one of"):
        functional.mgda_weights(torch.eye(2), "L2")  # type: ignore[arg-type]


@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sdmgrad_finds_the_min_norm_point_of_moved_rows(kind: str, lam: float) -> None:
    rows = hard_matrices(3)[kind]
    weights = functional.sdmgrad_weights(gram(rows), lam)
    moved = rows + lam * rows.mean(dim=0)
    expected = reference.min_norm(moved) / (1 + lam)
    assert gap(weights @ rows, expected, rows, weights) <= 1e-8


def test_sdmgrad_goes_to_the_mean() -> None:
    rows = hard_matrices(3)["generic"]
    torch.testing.assert_close(
        functional.sdmgrad_weights(gram(rows), 1e9), torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`lam` must be in \[0, inf\), got"):
            functional.sdmgrad_weights(torch.eye(2), bad)


@pytest.mark.parametrize("factors", [None, [2.0, 0.1, 1.0]])
@pytest.mark.parametrize("kind", KINDS)
def test_db_mtl_gives_all_rows_the_largest_norm(kind: str, factors: list[float] | None) -> None:
    rows = hard_matrices(3)[kind]
    scaled = rows * torch.tensor(factors or [1.0] * 3, dtype=torch.float64)[:, None]
    lengths = [row.norm() for row in scaled]
    units = [row / n for row, n in zip(scaled, lengths, strict=True) if n > 0]
    expected = max(lengths) * sum(units, torch.zeros(rows.shape[1], dtype=torch.float64))
    weights = functional.db_mtl_weights(gram(rows), factors)
    assert gap(weights @ rows, expected, rows, weights) <= 1e-8


def test_db_mtl_refuses_factors_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"`factors` must be in \[0, inf\), got -1.0 at 0"):
        functional.db_mtl_weights(torch.eye(2), [-1.0, 1.0])


def test_excess_risk_is_the_sum_over_roots_of_all_squares_so_far() -> None:
    steps = torch.randn(4, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps[:, :, 0] = 0
    roots = None
    for t, jacobian in enumerate(steps):
        found = functional.excess_risk(jacobian, roots)
        for i in range(3):
            squares = [sum(float(s[i, k]) ** 2 for s in steps[: t + 1]) for k in range(50)]
            terms = [
                float(jacobian[i, k]) ** 2 / math.sqrt(h) for k, h in enumerate(squares) if h > 0
            ]
            assert math.isclose(float(found.risk[i]), sum(terms), rel_tol=1e-12)
            alone = functional.excess_risk(jacobian[i], None if roots is None else roots[i])
            torch.testing.assert_close(alone.risk, found.risk[i])
        roots = found.roots


def test_excess_risk_keeps_squares_that_single_precision_cannot_hold() -> None:
    first = functional.excess_risk(torch.tensor([3e30, 0.0]))
    second = functional.excess_risk(torch.tensor([4e30, 0.0]), first.roots)
    assert second.roots.dtype == torch.float32
    assert math.isclose(second.risk.item(), 3.2e30, rel_tol=1e-6)
    assert functional.excess_risk(torch.ones(2, dtype=torch.bfloat16)).roots.dtype == torch.float32
    with pytest.raises(ValueError, match=r"`roots` must have shape \[3\], got \[2\]"):
        functional.excess_risk(torch.ones(3), first.roots)


@pytest.mark.parametrize("kind", ["generic", "scales", "zero row", "all zero"])
def test_a_normalised_solve_is_that_of_the_gram_over_its_norm(kind: str) -> None:
    rows = hard_matrices(3)[kind]
    size = max(float(gram(rows).norm()), 1e-300)
    for s in (1.0, 64.0):
        K = gram(s * rows)
        nash, fair = (
            functional.nash_weights(K, normalize=True),
            functional.fairgrad_weights(K, 3.0, normalize=True),
        )
        torch.testing.assert_close(nash, functional.nash_weights(gram(rows) / size))
        torch.testing.assert_close(fair, functional.fairgrad_weights(gram(rows) / size, 3.0))


def test_clipped_weights_give_a_direction_of_at_most_the_bound() -> None:
    rows = hard_matrices(3)["generic"]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    length = float((weights @ rows).norm())
    clipped = functional.clip_weights(weights, gram(rows), length / 4)
    torch.testing.assert_close(clipped, weights / 4)
    assert torch.equal(functional.clip_weights(weights, gram(rows), 2 * length), weights)
    assert functional.clip_weights([0.0, 0.0, 0.0], gram(rows), 1.0).tolist() == [0, 0, 0]
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`max_norm` must be in \(0, inf\), got"):
            functional.clip_weights(weights, gram(rows), bad)
