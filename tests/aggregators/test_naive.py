"""Methods against their formulas written out on the rows themselves, without a Gram matrix."""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Literal

import numpy as np
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


# ConicGrad


def conic_grad(jacobian: Tensor, c: float) -> Tensor:
    """Try every set of tasks that may be worst together, inside the cone and at its edge.

    All points of the hull of some rows, moved along the mean, that gain equally for these rows lie
    on a line.
    """
    mean = jacobian.mean(0)
    axis, found = mean / mean.norm(), []
    for size in range(1, len(jacobian) + 1):
        for chosen in combinations(range(len(jacobian)), size):
            some = jacobian[list(chosen)]
            sides = some[1:] - some[0]
            across = torch.eye(len(mean), dtype=torch.float64) - torch.linalg.pinv(sides) @ sides
            start, step = across @ some[0], across @ axis
            edge = [
                (v @ axis) * (w @ axis) - c**2 * (v @ w)
                for v, w in ((step, step), (start, step), (start, start))
            ]
            pulls = np.roots([float(edge[0]), 2 * float(edge[1]), float(edge[2])])
            for pull in [0.0, *(float(p.real) for p in pulls if abs(p.imag) < 1e-12)]:
                point = start + pull * step
                found.append(mean.norm() * point / point.norm())
    inside = [d for d in found if d @ axis >= (c - 1e-9) * mean.norm()]
    return max(inside, key=lambda d: float((jacobian @ d).min()))


@pytest.mark.parametrize("c", [0.05, 0.3, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_conic_grad_serves_the_worst_task_best(m: int, c: float) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        jacobian = torch.randn(m, 7, dtype=torch.float64, generator=generator)
        jacobian[0] *= 5
        close(a.ConicGrad(c)(jacobian), conic_grad(jacobian, c))


@pytest.mark.parametrize("c", [0.2, 0.7, 0.99, 0.999999])
@pytest.mark.parametrize("m", [2, 4, 9, 20])
def test_no_direction_of_conic_grads_cone_is_better(m: int, c: float) -> None:
    jacobian = rows(m, 30, m)
    mean, d = jacobian.mean(0), a.ConicGrad(c)(jacobian)
    torch.testing.assert_close(d.norm(), mean.norm(), rtol=1e-10, atol=0)
    cosine = float(mean @ d / mean.norm() ** 2)
    assert cosine >= c - 1e-12
    # d solves the problem if it is a nonnegative sum of rows that gain equally and, at the edge of
    # the cone, of the mean.
    gains, worst = jacobian @ d, float((jacobian @ d).min())
    active = jacobian[gains <= worst + 1e-9 * abs(worst) + 1e-9 * float(mean.norm())]
    parts = torch.cat([active, mean[None]] if cosine <= c + 1e-9 else [active])
    unit = parts / parts.norm(dim=1, keepdim=True)
    shares = torch.linalg.lstsq(unit.T, d / d.norm()).solution
    assert (shares >= -1e-9).all()
    assert (unit.T @ shares - d / d.norm()).norm() < 1e-8


def test_conic_grad_limits() -> None:
    jacobian = rows(4, 9, 1)
    mean, shortest_point = jacobian.mean(0), a.MGDA()(jacobian)
    close(a.ConicGrad(1.0)(jacobian), mean)
    close(a.ConicGrad(0.0)(jacobian), mean.norm() * shortest_point / shortest_point.norm())


def test_conic_grad_harms_no_task_where_it_can_serve_none() -> None:
    first = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # The mean (0, 1/3) harms none itself.
    close(a.ConicGrad(0.5)(first), torch.tensor([0.0, 1 / 3], dtype=torch.float64))
    # Along the only line there is one task is harmed; the mean's direction is all the cone has.
    line = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    torch.testing.assert_close(a.ConicGrad(0.5)(line), torch.tensor([-1.0]).double())


# GO4Align


def partitions(items: list[int], groups: int) -> Iterator[list[list[int]]]:
    """All ways to part the items into at most so many groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:], groups):
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]
        if len(rest) < groups:
            yield [[items[0]], *rest]


def group_means(values: list[float], groups: int) -> list[float]:
    def mean(group: list[int]) -> float:
        return sum(values[i] for i in group) / len(group)

    def spread(parts: list[list[int]]) -> float:
        return sum((values[i] - mean(group)) ** 2 for group in parts for i in group)

    best = min(partitions(list(range(len(values))), groups), key=spread)
    return [next(mean(g) for g in best if i in g) for i in range(len(values))]


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 9])
def test_go4align_over_some_steps(groups: int) -> None:
    method, step_size = a.GO4Align(groups, step_size=0.3), 0.3
    generator = torch.Generator().manual_seed(groups)
    chances = [1 / 6] * 6
    for _ in range(4):
        losses = (torch.rand(6, dtype=torch.float64, generator=generator) + 0.05).tolist()
        jacobian = torch.randn(6, 7, dtype=torch.float64, generator=generator)
        chances = [p * math.exp(-step_size * x) for p, x in zip(chances, losses, strict=True)]
        chances = [p / sum(chances) for p in chances]
        indicators = [p * sum(losses) / x for p, x in zip(chances, losses, strict=True)]
        weights = torch.tensor(group_means(indicators, groups), dtype=torch.float64)
        close(method(jacobian, losses=losses), weights @ jacobian)


def test_go4align_finds_the_groups_whatever_their_sizes_and_scales() -> None:
    values = torch.tensor([1.0, 1.1, 0.9, 5.0, 5.1, 40.0]) * 1e-8
    weights = a.GO4Align(3, step_size=0.0).loss_weights(tuple("abcdef"), values.double())
    assert len({round(w, 9) for w in weights.tolist()}) == 3
    assert weights[0] == weights[1] == weights[2] > weights[3] == weights[4] > weights[5]
    assert a.GO4Align(2).loss_weights(("a",), torch.tensor([1e-30]).double()).tolist() == [1.0]
    faint = a.GO4Align(2).loss_weights(
        tuple("ab"), torch.tensor([1e-300, 1e20], dtype=torch.float64)
    )
    assert faint.isfinite().all()


# LDC-MTL


@pytest.mark.parametrize("compared", ["weighted", "plain"])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_ldc_mtl_descends_on_its_objective(m: int, compared: Literal["weighted", "plain"]) -> None:
    method = a.LDCMTL(lam=0.3, compared=compared, lr=0.05)
    scores = torch.ones(m, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scores], lr=0.05)
    generator = torch.Generator().manual_seed(m)
    for _ in range(4):
        losses = torch.rand(m, dtype=torch.float64, generator=generator).requires_grad_()
        jacobian = torch.randn(m, 7, dtype=torch.float64, generator=generator)
        sigma = scores.sigmoid()
        shown = sigma * losses if compared == "weighted" else losses
        objective = (sigma * losses).sum() / sigma.sum().detach()
        objective = objective + 0.3 * (shown[:-1] - shown[1:]).abs().sum()
        weights, scores.grad = torch.autograd.grad(objective, [losses, scores])
        close(method(jacobian, losses=losses.detach()), weights @ jacobian)
        adam.step()
        method.step()


def test_ldc_mtl_compares_the_tasks_that_are_there_and_absent_ones_stand_still() -> None:
    method = a.LDCMTL(lam=0.2, compared="plain", lr=0.1)
    weights = method.loss_weights(("a", "b", "c"), torch.tensor([1.0, 9.0, 2.0]).double())
    close(weights, torch.tensor([1 / 3 - 0.2, 1 / 3 + 0.4, 1 / 3 - 0.2], dtype=torch.float64))
    method.step()
    before = method.get_state()["scalars"]["b"]
    weights = method.loss_weights(("a", "c"), torch.tensor([1.0, 2.0]).double())
    assert weights[1] - weights[0] == pytest.approx(0.4, abs=1e-3)
    method.step()
    assert method.get_state()["scalars"]["b"] == before


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_numbers_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"`temperature` must be in \(0, inf\), got"):
        a.UWSO(bad)
    if bad != 0:
        with pytest.raises(ValueError, match=r"`exponent` must be in \[0, inf\), got"):
            a.NTKMTL(bad)
        with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\], got"):
            a.ConicGrad(bad)
        with pytest.raises(ValueError, match=r"`step_size` must be in \[0, inf\), got"):
            a.GO4Align(step_size=bad)
        with pytest.raises(ValueError, match=r"`lam` must be in \[0, inf\), got"):
            a.LDCMTL(bad)
    with pytest.raises(ValueError, match="`num_groups` must be an integer >= 1, got"):
        a.GO4Align(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'weighted' or 'plain', got 'both'"):
        a.LDCMTL(compared="both")  # type: ignore[arg-type]
