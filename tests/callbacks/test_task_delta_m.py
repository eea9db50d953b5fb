"""TaskDeltaM logs Delta_m by task."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task
from lightning_flatmtl.callbacks import TaskDeltaM
from lightning_flatmtl.metrics import delta_m_by_task
from tests.helpers import data, encoder, trainer

BASELINES = {"a/accuracy": 0.4, "b/mse": 1.5, "b/mae": 1.0}


def module(baselines: dict[str, float] | None) -> MultiTaskModule:
    torch.manual_seed(0)
    errors = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}
    tasks = [
        Task("a", nn.Linear(5, 3), nn.CrossEntropyLoss(), {"accuracy": MulticlassAccuracy(3)}),
        Task("b", nn.Linear(5, 2), nn.MSELoss(), errors),
    ]
    return MultiTaskModule(encoder(), tasks, baselines=baselines).double()


def test_it_is_the_mean_over_the_metrics_of_each_task() -> None:
    run = trainer([TaskDeltaM()])
    run.fit(module(BASELINES), data(), data(20, seed=1))
    logged = run.callback_metrics
    accuracy, mse, mae = (float(logged[f"val/{name}"]) for name in BASELINES)
    a = 100 * (accuracy - 0.4) / 0.4
    b = -100 * ((mse - 1.5) / 1.5 + (mae - 1.0) / 1.0) / 2
    assert float(logged["val/a/delta_m"]) == pytest.approx(a, rel=1e-5)
    assert float(logged["val/b/delta_m"]) == pytest.approx(b, rel=1e-5)
    assert float(logged["val/delta_m"]) == pytest.approx((a + 2 * b) / 3, rel=1e-4)
    assert "train/a/delta_m" not in logged


def test_every_loader_has_its_own() -> None:
    run = trainer([TaskDeltaM()])
    run.test(module(BASELINES), [data(8), data(20, seed=1)], verbose=False)
    for loader in (0, 1):
        assert f"test/a/delta_m/dataloader_idx_{loader}" in run.callback_metrics
    assert "test/a/delta_m" not in run.callback_metrics


def test_an_epoch_without_a_task_has_none() -> None:
    run = trainer([TaskDeltaM()])
    lacking = [(x, {"a": targets["a"]}) for x, targets in data()]
    run.validate(module(BASELINES), torch.utils.data.DataLoader(lacking, batch_size=None))
    assert not any("delta_m" in name for name in run.callback_metrics)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="got a module without `baselines`"):
        trainer([TaskDeltaM()]).fit(module(None), data())
    with pytest.raises(MisconfigurationException, match="needs a MultiTaskModule"):
        trainer([TaskDeltaM()]).test(BoringModel(), verbose=False)


def test_by_hand() -> None:
    values = {"x/1": 2.0, "x/2": 1.0, "y/1": 0.5, "z": 1.0}
    ones, up = dict.fromkeys(values, 1.0), dict.fromkeys(values, True)
    assert delta_m_by_task(values, ones, up) == {"x": 50.0, "y": -50.0, "z": 0.0}
    assert delta_m_by_task(values, ones, up, sign="drop")["y"] == 50.0
    with pytest.raises(ValueError, match="has no baseline"):
        delta_m_by_task(values, {}, up)
