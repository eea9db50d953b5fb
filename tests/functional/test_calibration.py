"""Calibration, Brier score and entropy against loops over the samples."""

import math

import numpy as np
import pytest
import torch

from lightning_flatmtl.functional import (
    brier_scores,
    calibration_bins,
    calibration_error,
    predictive_entropy,
)


def logits(n: int = 200, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("n_bins", [1, 2, 10, 15])
def test_bins_are_those_of_a_loop(n_bins) -> None:
    g = torch.Generator().manual_seed(1)
    confidences = torch.rand(300, generator=g).double()
    confidences[:3] = torch.tensor([0.0, 0.5, 1.0])
    outcomes = torch.randint(0, 2, (300,), generator=g)
    expected = np.zeros((3, n_bins))
    for p, hit in zip(confidences.tolist(), outcomes.tolist(), strict=True):
        b = max(i for i in range(n_bins) if p >= i / n_bins)
        expected[:, b] += 1, p, hit
    found = calibration_bins(confidences, outcomes, n_bins)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    error = sum(abs(a - c) for _, c, a in expected.T) / 300
    assert calibration_error(found).item() == pytest.approx(error, abs=1e-12)


def test_bins_of_batches_add_up() -> None:
    p, hit = torch.rand(100).double(), torch.rand(100) < 0.5
    parts = [calibration_bins(p[i : i + 30], hit[i : i + 30], 7) for i in range(0, 100, 30)]
    torch.testing.assert_close(sum(parts), calibration_bins(p, hit, 7))


def test_a_count_beyond_single_precision_is_exact() -> None:
    bins = calibration_bins(torch.tensor([0.5]), torch.tensor([1])) + torch.tensor([[2.0**24]] * 3)
    assert bins[0].max().item() == 2**24 + 1


def test_perfectly_calibrated_is_zero_and_nothing_is_nan() -> None:
    p = torch.tensor([0.25] * 4 + [1.0] * 3)
    hit = torch.tensor([1, 0, 0, 0, 1, 1, 1])
    assert calibration_error(calibration_bins(p, hit)).item() == 0
    assert calibration_error(calibration_bins(p[:0], hit[:0])).isnan()


def test_a_confidence_that_is_nan_is_not_hidden() -> None:
    bins = calibration_bins(torch.tensor([0.2, math.nan]), torch.tensor([1, 0]))
    assert calibration_error(bins).isnan()


def test_brier_scores_are_those_of_a_loop() -> None:
    p = logits().softmax(1)
    y = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(3))
    expected = [
        sum((p[i, c].item() - (y[i].item() == c)) ** 2 for c in range(5)) for i in range(200)
    ]
    np.testing.assert_allclose(brier_scores(p, y).numpy(), expected, rtol=1e-12)
    two, yes = p[:, 0], (y == 1).long()
    both = torch.stack([1 - two, two], 1)
    torch.testing.assert_close(2 * brier_scores(two, yes), brier_scores(both, yes))


def test_entropies_are_those_of_a_loop() -> None:
    z = logits()
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(predictive_entropy(z).numpy(), -(p * np.log(p)).sum(1), rtol=1e-9)
    pair = torch.stack([torch.zeros(200).double(), z[:, 0]], 1)
    torch.testing.assert_close(predictive_entropy(z[:, 0]), predictive_entropy(pair))


def test_entropy_at_the_limits() -> None:
    extreme = torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [-1e30, 1e30, 0.0]])
    expected = torch.tensor([math.log(3), 0.0, 0.0])
    torch.testing.assert_close(predictive_entropy(extreme), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_bins(torch.rand(3), torch.rand(4)), r"shape \[n\], got \[3\] and"),
        (lambda: calibration_bins(torch.rand(3, 2), torch.rand(3, 2)), r"got \[3, 2\]"),
        (lambda: calibration_bins(torch.rand(3), torch.rand(3), 0), "`n_bins` must be .* got 0"),
        (lambda: calibration_error(torch.rand(2, 5)), r"\[3, n_bins\], got \[2, 5\]"),
        (lambda: brier_scores(torch.rand(3, 2), torch.rand(4)), r"got \[3, 2\] and \[4\]"),
        (lambda: predictive_entropy(torch.rand(3, 2, 1)), r"got \[3, 2, 1\]"),
    ],
)
def test_wrong_shapes_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
