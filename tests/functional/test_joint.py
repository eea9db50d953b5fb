"""Joint predictions against the product over all combinations, and risk against coverage."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flatmtl.functional import (
    area_under_risk,
    most_likely_combinations,
    risk_coverage,
)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 30), st.integers(0, 10_000)
)
@settings(max_examples=60, deadline=None)
def test_the_best_of_all_combinations(options: list[int], count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    factors = [
        torch.randn(3, n, dtype=torch.float64, generator=g).mul(3).log_softmax(1) for n in options
    ]
    logs, chosen = most_likely_combinations(factors, count)
    for sample in range(3):
        every = sorted(
            (
                (math.prod(f[sample, o].exp().item() for f, o in zip(factors, combo, strict=True)))
                for combo in itertools.product(*map(range, options))
            ),
            reverse=True,
        )[:count]
        assert logs[sample].exp().tolist() == pytest.approx(every, rel=1e-12)
        assert len({tuple(c) for c in chosen[sample].tolist()}) == len(every)
        for k in range(len(every)):
            parts = [f[sample, o] for f, o in zip(factors, chosen[sample, k].tolist(), strict=True)]
            assert sum(parts) == pytest.approx(float(logs[sample, k]), rel=1e-12, abs=1e-12)


def test_a_thousand_factors_do_not_underflow() -> None:
    logs, _ = most_likely_combinations([torch.tensor([[0.5, 0.5]]).double().log()] * 2000, 3)
    assert logs[0].tolist() == pytest.approx([2000 * math.log(0.5)] * 3)


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage(
        torch.tensor([0.3, 0.9, 0.5, 0.9, 0.5]), torch.tensor([False, True, True, True, False])
    )
    assert curve.threshold.tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert curve.coverage.tolist() == pytest.approx([0.4, 0.8, 1.0])
    assert curve.accuracy.tolist() == pytest.approx([1.0, 0.75, 0.6])
    assert area_under_risk(curve) == pytest.approx(0.4 * 0 + 0.4 * 0.25 + 0.2 * 0.4)


@given(st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_point_is_what_its_threshold_answers(count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    confidence = torch.randint(0, 8, (count,), generator=g) / 8
    correct = torch.rand(count, generator=g) < confidence
    for threshold, coverage, accuracy in zip(*risk_coverage(confidence, correct), strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(float(answered.double().mean()))
        assert accuracy == pytest.approx(float(correct[answered].double().mean()))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one choice"):
        most_likely_combinations([])
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        most_likely_combinations([torch.zeros(1, 2)], 0)
    for confidence, correct in (
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2, 1), torch.zeros(2, 1)),
    ):
        with pytest.raises(ValueError, match="must have the same shape"):
            risk_coverage(confidence, correct)
    with pytest.raises(ValueError, match="got NaN"):
        risk_coverage(torch.tensor([math.nan]), torch.ones(1))
