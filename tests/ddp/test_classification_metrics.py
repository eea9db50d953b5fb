"""Metrics of classifications on two processes are those of NumPy, in float64, on all samples."""

import os
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC

from lightning_flatmtl.metrics import (
    BrierScore,
    ErrorRate,
    LogitAUROC,
    MeanErrorRate,
    PredictiveEntropy,
)
from tests.ddp.cases import case
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

CLASSES, TASKS = 3, 4


def dense(kind: str) -> tuple[Tensor, Tensor]:
    """Logits of images ``[n, 3, 5, 4]`` and labels ``[n, 5, 4]``, or binary ones ``[n]``."""
    g = torch.Generator().manual_seed(7)
    if kind == "binary":
        return 3 * torch.randn(11, generator=g), torch.randint(0, 2, (11,), generator=g)
    z = 3 * torch.randn(7, CLASSES, 5, 4, generator=g)
    y = torch.randint(0, CLASSES, (7, 5, 4), generator=g)
    if kind == "one class":
        y[:] = 1
    return z, y


def labels_missing() -> tuple[Tensor, Tensor]:
    """Four binary tasks: one never labelled, one in a single process, one of a single class."""
    g = torch.Generator().manual_seed(8)
    z, y = torch.randn(9, TASKS, generator=g), torch.randint(-1, 2, (9, TASKS), generator=g)
    y[:, 0] = -1
    y[1::2, 1] = -1
    y[:, 2] = 1
    return z, y


def mine(place: Place, *tensors: Tensor) -> list[Tensor]:
    return [tensor[place.rank :: place.size] for tensor in tensors]


def run(place: Place) -> dict[str, Any]:
    if place.size > 1 and not dist.is_initialized():
        os.environ["WORLD_SIZE"] = str(place.size)  # a Trainer takes it away after a fit
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' notes on memory and on absent classes
        for kind in ("images", "one class", "binary"):
            z, y = mine(place, *dense(kind))
            metrics: dict[str, Any] = {
                "brier": BrierScore(),
                "entropy": PredictiveEntropy(),
                "error": ErrorRate(),
                "auroc": BinaryAUROC()
                if kind == "binary"
                else MulticlassAUROC(CLASSES, average=None),
            }
            if kind == "binary":
                metrics["logit auroc"] = LogitAUROC()
            for name, metric in metrics.items():
                half = len(z) // 2  # two batches
                metric.update(z[:half], y[:half])
                metric.update(z[half:], y[half:])
                found[f"{kind}/{name}"] = metric.compute().tolist()
        z, y = dense("binary")
        alone = LogitAUROC()  # only the first process has samples
        if place.rank == 0:
            alone.update(z, y)
        found["alone"] = alone.compute().item()
        found["none"] = LogitAUROC().compute().item()
        z, y = mine(place, *labels_missing())
        mean = MeanErrorRate(TASKS, missing=-1)
        mean.update(z, y)
        found["mean error"] = mean.compute().item()
    return found


case("classification metrics", run, (1, 2))


def columns(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``[n, classes]`` and labels ``[n]``, float64."""
    z, y = (t.double().numpy() for t in dense(kind))
    if kind == "binary":
        p = 1 / (1 + np.exp(-z))
        return np.stack([1 - p, p], 1), y
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    return np.moveaxis(p, 1, -1).reshape(-1, CLASSES), y.reshape(-1)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in the right order, ties half."""
    a, b = scores[positive][:, None], scores[~positive][None]
    return float(((a > b) + 0.5 * (a == b)).mean()) if a.size and b.size else 0.0


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["images", "one class", "binary"])
def test_they_are_numpys(runs: Any, kind: str, size: int) -> None:
    p, y = columns(kind)
    own = np.eye(p.shape[1])[y.astype(int)]
    brier = ((p - own) ** 2).sum(1).mean() * (0.5 if kind == "binary" else 1)
    for found in runs(size, "classification metrics"):
        assert found[f"{kind}/brier"] == pytest.approx(brier, rel=1e-12)
        entropy = -(p * np.log(p)).sum(1).mean()
        assert found[f"{kind}/entropy"] == pytest.approx(entropy, rel=1e-12)
        assert found[f"{kind}/error"] == (p.argmax(1) != y).mean()
        if kind == "binary":
            area = auroc(p[:, 1], y == 1)
            assert found["binary/auroc"] == pytest.approx(area, abs=1e-6)
            assert found["binary/logit auroc"] == pytest.approx(area, rel=1e-12)
            assert found["alone"] == pytest.approx(area, rel=1e-12)
            assert np.isnan(found["none"])
        else:
            areas = [auroc(p[:, c], y == c) for c in range(CLASSES)]
            assert found[f"{kind}/auroc"] == pytest.approx(areas, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_error_is_numpys(runs: Any, size: int) -> None:
    z, y = (t.numpy() for t in labels_missing())
    shares = [
        ((z[:, t] > 0) != y[:, t])[y[:, t] >= 0].mean()
        for t in range(TASKS)
        if (y[:, t] >= 0).any()
    ]
    assert len(shares) == TASKS - 1
    for found in runs(size, "classification metrics"):
        assert found["mean error"] == pytest.approx(np.mean(shares), rel=1e-15)
