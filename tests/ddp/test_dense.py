"""Metrics of images are those of all processes' pixels."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_flatmtl import DepthTask, MultiTaskModule, NormalsTask, SegmentationTask
from tests.ddp.cases import case
from tests.ddp.net import Batches, share
from tests.ddp.training import trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


def batches() -> list[Any]:
    """Of twelve images; labels are rare with the first process, and one batch has none there."""
    g = torch.Generator().manual_seed(0)

    def batch(lacking: slice) -> Any:
        target = torch.randint(-1, 3, (12, 4, 5), generator=g)  # of the classes 0 to 3
        depth, normals = torch.rand(12, 1, 4, 5, generator=g), torch.randn(12, 3, 4, 5, generator=g)
        depth[:6][torch.rand(6, 1, 4, 5, generator=g) < 0.9] = 0
        depth[lacking], normals[lacking], target[lacking] = 0, 0, -1
        x = torch.randn(12, 3, 4, 5, generator=g)
        return x, {"segmentation": target, "depth": depth, "normals": normals}

    return [batch(slice(0, 6)), batch(slice(0, 1))]


def run(place: Place) -> dict[str, float]:
    torch.manual_seed(0)
    tasks = [
        SegmentationTask("segmentation", 4, in_channels=2),
        DepthTask("depth", in_channels=2),
        NormalsTask("normals", in_channels=2),
    ]
    made = trainer(place, [])
    net = MultiTaskModule(nn.Conv2d(3, 2, 1), tasks)
    made.test(net, Batches(share(batch, place) for batch in batches()), verbose=False)
    return {name: float(value) for name, value in made.callback_metrics.items()}


case("dense/metrics", run)


@pytest.mark.parametrize("size", [2, 3])
def test_as_one_process(runs: Any, size: int) -> None:
    (one,) = runs(1, "dense/metrics")
    metrics = {name for name in one if not name.endswith("loss")}
    assert len(metrics) == 9
    for found in runs(size, "dense/metrics"):
        assert found.keys() == one.keys()
        for name in metrics:
            assert found[name] == pytest.approx(one[name], rel=1e-6), name
