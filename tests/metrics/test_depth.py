"""Errors of depth against NumPy, over batches of unequal shares of labels."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_flatmtl.metrics import DepthError
from tests.dense import depth_errors, depths

DEPTHS = depths()


@pytest.mark.parametrize("kind", DEPTHS)
def test_the_errors_are_those_of_all_pixels(kind) -> None:
    metrics = DepthError(), DepthError(relative=True)
    for predictions, target in DEPTHS[kind]:
        for metric in metrics:
            metric.update(predictions, target)
    found = [float(metric.compute()) for metric in metrics]
    assert found == pytest.approx(depth_errors(DEPTHS[kind]), rel=1e-12)


def test_every_pixel_weighs_the_same() -> None:
    batches = DEPTHS["unequal shares"]
    means = [depth_errors([batch])[0] for batch in batches]
    assert abs(sum(means) / 2 - depth_errors(batches)[0]) > 0.01  # the published mean of means


def test_both_errors_are_computed_once() -> None:
    both = MetricCollection({"abs": DepthError(), "rel": DepthError(relative=True)})
    for batch in DEPTHS["random"]:
        both.update(*batch)
    assert list(both.compute_groups.values()) == [["abs", "rel"]]
    values = both.compute()
    found = float(values["abs"]), float(values["rel"])
    assert found == pytest.approx(depth_errors(DEPTHS["random"]), rel=1e-12)


def test_they_are_metrics_like_others() -> None:
    batch = DEPTHS["random"][0]
    metric = DepthError(relative=True)
    first = metric(*batch)
    again = pickle.loads(pickle.dumps(metric))
    assert torch.equal(again.compute(), first)
    assert torch.equal(copy.deepcopy(metric).compute(), first)
    assert not metric.state_dict()
    assert metric.higher_is_better is False
    metric.reset()
    metric.update(batch[0], torch.zeros_like(batch[1]))
    assert metric.compute().isnan()


def test_shapes_that_would_be_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same shape.*got \[2, 1, 3, 3\] and \[2, 3, 3\]"):
        DepthError().update(torch.ones(2, 1, 3, 3), torch.ones(2, 3, 3))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_double(kind) -> None:
    target = torch.full((1, 1, 300, 300), 2.0)
    metric = DepthError()
    assert metric((target + 1).to(kind), target).item() == 1.0
