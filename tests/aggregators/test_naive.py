"""Methods against their formulas written out on the rows themselves, without a Gram matrix."""

import math

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import aggregators as a


def rows(m: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = 10.0 ** torch.randint(-3, 4, (m, 1), generator=generator)
    return lengths * torch.randn(m, d, dtype=torch.float64, generator=generator)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * float(expected.norm()))


# NTKMTL


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_ntkmtl_weighs_by_the_trace_over_each_kernel(m: int, exponent: float) -> None:
    jacobian = rows(m, 7, m)
    kernels = [sum(x * x for x in row.tolist()) for row in jacobian]
    expected = torch.zeros(7, dtype=torch.float64)
    for kernel, row in zip(kernels, jacobian, strict=True):
        expected += (sum(kernels) / kernel) ** exponent * row
    close(a.NTKMTL(exponent)(jacobian), expected)


def test_ntkmtl_leaves_a_zero_row_out() -> None:
    jacobian = rows(3, 7, 0)
    with_zero = torch.cat([jacobian, torch.zeros(1, 7, dtype=torch.float64)])
    close(a.NTKMTL()(with_zero), a.NTKMTL()(jacobian))


def test_ntkmtl_makes_all_terms_equally_long_however_short_a_row_is() -> None:
    jacobian = torch.diag(torch.tensor([1e-60, 1.0, 1e60], dtype=torch.float64))
    close(a.NTKMTL()(jacobian), torch.full((3,), 1e60, dtype=torch.float64))


# UW-SO


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("values", [[2.0], [0.7, 0.2, 1.5, 40.0]])
def test_uw_so_is_the_softmax_of_the_inverse_losses(
    values: list[float], temperature: float
) -> None:
    jacobian = rows(len(values), 7, 3)
    powers = [math.exp(1 / (temperature * value)) for value in values]
    expected = sum(p / sum(powers) * row for p, row in zip(powers, jacobian, strict=True))
    assert isinstance(expected, Tensor)
    close(a.UWSO(temperature)(jacobian, losses=values), expected)


def test_uw_so_of_the_smallest_losses_is_finite_and_shares_between_equal_ones() -> None:
    losses = torch.tensor([1e-300, 1e-310, 1.0], dtype=torch.float64)
    for temperature in (1.0, 1e-10):
        weights = a.UWSO(temperature).loss_weights(("0", "1", "2"), losses)
        assert weights.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_numbers_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"`temperature` must be in \(0, inf\), got"):
        a.UWSO(bad)
    if bad != 0:
        with pytest.raises(ValueError, match=r"`exponent` must be in \[0, inf\), got"):
            a.NTKMTL(bad)
