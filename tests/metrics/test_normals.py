"""Angles of surface normals against NumPy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_flatmtl.metrics import NormalAngle, NormalsWithin
from tests.dense import angles, normals

NORMALS = normals()
BOUNDS = (11.25, 22.5, 30.0)


def collection() -> MetricCollection:
    within = {str(bound).replace(".", "_"): NormalsWithin(bound) for bound in BOUNDS}
    return MetricCollection({"mean": NormalAngle(), "median": NormalAngle("median"), **within})


@pytest.mark.parametrize("kind", NORMALS)
def test_the_angles_are_those_of_all_pixels(kind) -> None:
    metrics = collection()
    for batch in NORMALS[kind]:
        metrics.update(*batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    expected = angles(NORMALS[kind])
    # An arc cosine near 1 has the root of its argument's precision.
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-9, abs=1e-7)
    assert abs(found["median"] - np.median(expected)) <= 0.005 + 1e-7
    for bound in BOUNDS:
        name = str(bound).replace(".", "_")
        assert found[name] == pytest.approx((expected < bound).mean(), abs=1e-15)


def test_the_median_is_of_all_and_not_of_the_batches() -> None:
    batches = NORMALS["random"]
    of_batches = np.mean([np.median(angles([batch])) for batch in batches])
    assert abs(of_batches - np.median(angles(batches))) > 1


def test_angles_are_computed_once_for_all() -> None:
    metrics = collection()
    metrics.update(*NORMALS["random"][0])
    assert len(metrics.compute_groups) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
def test_the_median_of_few(count) -> None:
    g = torch.Generator().manual_seed(count)
    at = torch.rand(count, generator=g, dtype=torch.float64) * torch.pi
    predictions = torch.stack([at.cos(), at.sin(), torch.zeros(count)], 1)
    target = torch.tensor([1.0, 0.0, 0.0]).expand(count, 3)
    found = float(NormalAngle("median")(predictions, target))
    assert abs(found - np.median(np.degrees(at.numpy()))) <= 0.005


def test_a_bound_is_not_within_itself() -> None:
    """Exactly 90 and 180 degrees, of which atan2 knows."""
    target = torch.tensor([[1.0, 0.0, 0.0]])
    assert NormalsWithin(90)(torch.tensor([[0.0, 1.0, 0.0]]), target).item() == 0
    assert NormalsWithin(90.01)(torch.tensor([[0.0, 1.0, 0.0]]), target).item() == 1
    assert NormalsWithin(180)(-target, target).item() == 1  # the last bin holds its end


@pytest.mark.parametrize("metric", [NormalAngle(), NormalAngle("median"), NormalsWithin(30)])
def test_they_are_metrics_like_others(metric) -> None:
    batch = NORMALS["random"][0]
    metric.reset()
    first = metric(*batch)
    again = pickle.loads(pickle.dumps(metric))
    assert torch.equal(again.compute(), first)
    assert torch.equal(copy.deepcopy(metric).compute(), first)
    assert not metric.state_dict()
    assert metric.higher_is_better is isinstance(metric, NormalsWithin)
    metric.reset()
    metric.update(batch[0], torch.zeros_like(batch[1]))
    assert metric.compute().isnan()
    metric.update(torch.full_like(batch[0], torch.nan), batch[1])
    metric.update(*batch)
    assert metric.compute().isnan()


@pytest.mark.parametrize("degrees", [0, -1, 180.5, 11.255, float("nan")])
def test_bounds_that_are_no_edge_are_refused(degrees) -> None:
    with pytest.raises(ValueError, match=r"`degrees` must be in \(0, 180\] and a multiple of 0.01"):
        NormalsWithin(degrees)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`statistic` must be 'mean' or 'median', got 'mode'"):
        NormalAngle("mode")
    with pytest.raises(ValueError, match=r"\[n, 3, ...\], got \[2, 4\] and \[2, 4\]"):
        NormalAngle().update(torch.ones(2, 4), torch.ones(2, 4))
