"""Weighted sums of rows are right wherever they can be told."""

import math

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.engine import NonFiniteError, gram_matrix
from lightning_flatmtl.engine.aggregation import TaskGradients
from lightning_flatmtl.engine.gradients.combination import (
    bounded_factor,
    refuse_infinite_direction,
    refuse_infinite_weights,
    scaled,
    weighted_rows,
)


def part_of(rows: Tensor) -> TaskGradients:
    return TaskGradients(rows, gram_matrix(rows), ("a", "b", "c")[: len(rows)])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# Rows and their weights; in float64 the sums keep 8 digits even where terms cancel.
CASES: dict[str, tuple[Tensor, list[float]]] = {
    "plain": (normal(3, 70_000), [1.5, -0.25, 3.0]),
    "float64": (normal(3, 50, dtype=torch.float64), [1.5, -0.25, 3.0]),
    "a zero": (normal(3, 50), [1.5, 0.0, 3.0]),
    "all zero": (normal(3, 50), [0.0, 0.0, 0.0]),
    "tiny rows, vast weights": (normal(3, 50) * 1e-37, [1e39, -1e40, 1e38]),
    "vast rows, tiny weights": (normal(3, 50) * 1e37, [1e-39, -1e-44, 1e-40]),
    "terms that cancel": (
        normal(1, 50).expand(3, 50) + 1e-3 * normal(3, 50),
        [1e6, 1e6, -2e6 * (1 - 1e-5)],
    ),
}


@pytest.mark.parametrize(("rows", "given"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("gain", [1.0, 3.0, 0.125])
def test_equals_the_sum_in_float64(rows: Tensor, given: list[float], gain: float) -> None:
    weights = torch.tensor(given, dtype=torch.float64)
    exact = gain * (weights @ rows.double())
    precision = 1e-15 if rows.dtype == torch.float64 else 2e-6
    bound = precision * float(exact.norm()) * (1 if exact.any() else 0)

    def close(found: Tensor, expected: Tensor, scale: float = 0.0) -> bool:
        return float((found.double() - expected).norm()) <= bound + precision * scale

    part = part_of(rows)
    found = weighted_rows(weights, part, "method", gain=gain)
    assert found.dtype == rows.dtype
    assert close(found, exact)
    # Added to what is there, or in the place of what may be anything.
    there = torch.full_like(rows[0], 0.5 * float(exact.abs().max()))
    onto = there.clone()
    assert weighted_rows(weights, part, "method", onto=onto, gain=gain) is onto
    assert close(onto, exact + there.double(), float(there.norm()))
    onto = torch.full_like(rows[0], math.nan)
    weighted_rows(weights, part, "method", onto=onto, gain=gain, empty=True)
    assert close(onto, exact)
    # A process's share of the columns, decided by the whole rows.
    share = weighted_rows(weights, part, "method", rows=rows[:, 10:20].contiguous(), gain=gain)
    assert close(share, exact[10:20])


@pytest.mark.parametrize("weight", [1e39, -1e39, math.inf, math.nan])
def test_a_sum_beyond_the_range_names_the_longest_term(weight: float) -> None:
    rows = torch.eye(3)
    weights = torch.tensor([1e38, weight, 1.0], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"'method' must be finite.* task 'b', whose gradient"):
        weighted_rows(weights, part_of(rows), "method")


def test_a_direction_that_is_no_weighted_sum_names_the_longest_row() -> None:
    part = part_of(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    refuse_infinite_direction(True, part, "method")
    with pytest.raises(NonFiniteError, match=r"task 'c', whose gradient has the norm 3\. Rescale"):
        refuse_infinite_direction(False, part, "method")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_of_losses_that_are_not_finite(value: float) -> None:
    refuse_infinite_weights(None, ("a", "b"), "method")
    refuse_infinite_weights(torch.tensor([1.0, -1e300], dtype=torch.float64), ("a", "b"), "method")
    with pytest.raises(NonFiniteError, match=f"'method' must be finite, got {value} for task 'b'"):
        refuse_infinite_weights(torch.tensor([1.0, value]), ("a", "b"), "method")


@pytest.mark.parametrize(
    ("entry", "factor"), [(3.0, -2.0), (3e-37, -1e40), (3e37, 1e-40), (3.0, 0.0), (3e-30, 2.0**100)]
)
def test_a_row_times_a_factor(entry: float, factor: float) -> None:
    for dtype in (torch.float32, torch.float64):
        row = torch.tensor([entry, -entry], dtype=dtype)
        expected = (row.double() * factor).to(dtype)
        torch.testing.assert_close(scaled(row, factor), expected, rtol=1e-6, atol=0)


def test_a_backward_pass_begins_within_the_range_of_its_type() -> None:
    assert bounded_factor(5.0, torch.float16) == 5.0
    assert bounded_factor(1e6, torch.float16) == torch.finfo(torch.float16).max ** 0.8
    assert bounded_factor(1e6, torch.float32) == 1e6
