"""What is logged, under which names, and that the numbers are those of the data."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassRecall

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.metrics import delta_m
from tests.helpers import data, encoder, fit, sgd, trainer

BASELINES = {
    "a/accuracy": 0.5,
    "a/recall": 0.25,
    "a/f1": 0.25,
    "b/mse": 2.0,
    "b/mae": 1.0,
}
HIGHER = {name: name.startswith("a/") for name in BASELINES}
METHODS = [[], [CAGrad(), TaskSAM(0.2)]]


def measured(**kwargs: Any) -> MultiTaskModule:
    """Accuracy and recall share their states in a compute group."""
    torch.manual_seed(3)
    tasks = [
        Task(
            "a",
            nn.Linear(5, 3),
            nn.CrossEntropyLoss(),
            {
                "accuracy": MulticlassAccuracy(3, average="micro"),
                "recall": MulticlassRecall(3),
                "f1": MulticlassF1Score(3),
            },
        ),
        Task(
            "b",
            nn.Linear(5, 2),
            nn.MSELoss(),
            {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()},
        ),
    ]
    return MultiTaskModule(encoder(), tasks, optimizer=sgd, **kwargs).double()


def by_hand(model: MultiTaskModule, loader: Any) -> dict[str, float]:
    """Metrics of the whole data at once, with fresh metrics."""
    model.eval()
    inputs, targets = loader.dataset.inputs, loader.dataset.targets
    with torch.no_grad():
        predictions = model(inputs)
    found = {}
    for task in model.tasks:
        prediction = predictions[task.name]
        found[f"{task.name}/loss"] = task.loss(prediction, targets[task.name]).item()
        for name, metric in task.metrics.items():
            fresh = metric.clone()
            fresh.update(prediction, targets[task.name])
            found[f"{task.name}/{name}"] = fresh.compute().item()
    found["loss"] = found["a/loss"] + found["b/loss"]
    found["delta_m"] = delta_m({k: found[k] for k in BASELINES}, BASELINES, HIGHER)
    return found


def assert_measured(logged: dict[str, Any], stage: str, model: Any, loader: Any, end="") -> None:
    expected = by_hand(model, loader)
    for name, value in expected.items():
        key = f"{stage}/{name}{end}"
        assert float(logged[key]) == pytest.approx(value, rel=1e-5), key


def names(stage: str, end: str = "") -> set[str]:
    own = ["loss", "a/loss", "b/loss", *BASELINES, "delta_m"]
    return {f"{stage}/{name}{end}" for name in own}


@pytest.mark.parametrize("callbacks", METHODS)
def test_names_in_training(callbacks: list[pl.Callback]) -> None:
    model = measured(baselines=BASELINES)
    done = fit(model, callbacks, val=data(20, seed=1), max_epochs=2)
    assert set(done.callback_metrics) == names("train") | names("val")
    assert set(done.progress_bar_metrics) == {"train/loss", "val/loss"}
    assert_measured(done.callback_metrics, "val", model, data(20, seed=1))


def test_without_baselines_there_is_no_delta_m() -> None:
    done = fit(measured(), val=data(8))
    assert set(done.callback_metrics) == (names("train") | names("val")) - {
        "train/delta_m",
        "val/delta_m",
    }


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("callbacks", METHODS)
def test_alone(verb: str, callbacks: list[pl.Callback]) -> None:
    model, stage = measured(baselines=BASELINES), {"validate": "val", "test": "test"}[verb]
    runner = trainer(callbacks)
    for seed in (1, 2):  # nothing of the first run is left in the second
        loader = data(20, seed=seed)
        (logged,) = getattr(runner, verb)(model, loader, verbose=False)
        assert set(logged) == names(stage)
        assert_measured(logged, stage, model, loader)


@pytest.mark.parametrize("callbacks", METHODS)
def test_training_metrics_are_those_of_the_clean_pass(callbacks: list[pl.Callback]) -> None:
    """One epoch at lr = 0 in evaluation mode sees what validation sees."""
    model = measured(baselines=BASELINES)
    model._optimizer = lambda params: torch.optim.SGD(params, lr=0.0)

    class Evaluation(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.eval()

    done = fit(model, [*callbacks, Evaluation()], data(16), max_epochs=1)
    logged = {k: v for k, v in done.callback_metrics.items() if not k.endswith("loss")}
    expected = by_hand(model, data(16))
    assert len(logged) == 6
    for name, value in logged.items():
        assert value.item() == pytest.approx(expected[name.removeprefix("train/")], rel=1e-5)


def test_the_sanity_check_leaves_no_trace() -> None:
    runs = []
    for steps in (0, 2):
        model = measured(baselines=BASELINES)
        done = fit(model, val=data(20, seed=1), num_sanity_val_steps=steps)
        runs.append({k: v.item() for k, v in done.callback_metrics.items()})
    assert runs[0] == runs[1]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_several_loaders_are_measured_one_by_one(verb: str) -> None:
    model, stage = measured(baselines=BASELINES), {"validate": "val", "test": "test"}[verb]
    loaders = [data(20, seed=1), data(12, seed=2), data(8, seed=3)]
    for _ in range(2):
        logged = getattr(trainer(), verb)(model, loaders, verbose=False)
        together = {name: value for part in logged for name, value in part.items()}
        for i, loader in enumerate(loaders):
            assert_measured(together, stage, model, loader, f"/dataloader_idx_{i}")
    (alone,) = getattr(trainer(), verb)(model, loaders[1], verbose=False)
    assert set(alone) == names(stage)
    assert_measured(alone, stage, model, loaders[1])


def test_several_loaders_in_training() -> None:
    model = measured(baselines=BASELINES)
    loaders = [data(20, seed=1), data(12, seed=2)]
    done = fit(model, [CAGrad(), TaskSAM()], val=loaders, max_epochs=2)
    for i, loader in enumerate(loaders):
        end = f"/dataloader_idx_{i}"
        assert_measured(done.callback_metrics, "val", model, loader, end)
    assert set(done.callback_metrics) == {
        *names("train"),
        *names("val", "/dataloader_idx_0"),
        *names("val", "/dataloader_idx_1"),
    }


def only(task: str, loader: Any) -> Any:
    loader.dataset.targets = {task: loader.dataset.targets[task]}
    return loader


def test_a_loader_for_each_task() -> None:
    """Then no loader has all metrics, and there is no Delta_m."""
    model = measured(baselines=BASELINES)
    loaders = [only("a", data(20, seed=1)), only("b", data(12, seed=2))]
    first, second = trainer().validate(model, loaders, verbose=False)
    whole = [by_hand(model, data(20, seed=1)), by_hand(model, data(12, seed=2))]
    expected = {n for n in names("val", "/dataloader_idx_0") if "/b/" not in n and "delta" not in n}
    assert set(first) == expected
    assert first["val/a/accuracy/dataloader_idx_0"] == pytest.approx(whole[0]["a/accuracy"])
    assert second["val/b/mse/dataloader_idx_1"] == pytest.approx(whole[1]["b/mse"])


@pytest.mark.parametrize("stage", ["train", "val"])
def test_delta_m_can_be_watched(stage: str) -> None:
    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, threshold=1e6
    )
    config = {"monitor": f"{stage}/delta_m"}
    model = measured(baselines=BASELINES, lr_scheduler=plateau, lr_scheduler_config=config)
    stop = EarlyStopping(f"{stage}/delta_m", mode="max", patience=1, min_delta=1e6)
    done = fit(model, [stop], val=data(20, seed=1), max_epochs=5)
    assert done.current_epoch == 2
    assert done.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_file_of_baselines(tmp_path: Path) -> None:
    file = tmp_path / "single.json"
    file.write_text(json.dumps(BASELINES))
    model = measured(baselines=str(file))
    (logged,) = trainer().test(model, data(20, seed=1), verbose=False)
    assert_measured(logged, "test", model, data(20, seed=1))


def test_checkpoints_hold_no_metrics(tmp_path: Path) -> None:
    """They load into a module with other metrics, or with none."""
    model = measured()
    done = fit(model, val=[data(8), data(8)])
    done.save_checkpoint(tmp_path / "x.ckpt")
    without = measured()
    bare = [Task(task.name, task.head, task.loss) for task in without.tasks]
    loaded = MultiTaskModule.load_from_checkpoint(
        tmp_path / "x.ckpt", encoder=without.encoder, tasks=bare
    )
    assert torch.equal(loaded.heads["a"].weight, model.heads["a"].weight)


class OwnSteps(MultiTaskModule):
    """Feeds metrics from a step of its own."""

    def validation_step(self, batch, batch_idx):
        features = self.encode(batch)
        for task in self.tasks:
            self.update_metrics(task, self.task_output(task, features), batch[1][task])


def test_metrics_know_the_stage_they_are_fed_in() -> None:
    model = measured()
    model.__class__ = OwnSteps
    done = fit(model, val=data(20, seed=1), max_epochs=1)
    expected = by_hand(model, data(20, seed=1))
    for name in BASELINES:
        assert done.callback_metrics[f"val/{name}"].item() == pytest.approx(
            expected[name], rel=1e-5
        )


def test_losses_by_hand_count_nowhere() -> None:
    """In a notebook, before or after a fit, nothing is logged and no metric moves."""
    model = measured(baselines=BASELINES)
    batch = next(iter(data()))
    model.losses(batch, 0)
    fit(model, val=data(8))
    model.losses(batch, 0)
    members = [m for m in model.modules() if hasattr(m, "update_called")]
    assert members
    assert not any(m.update_called for m in members)


def test_predictions() -> None:
    model = measured()
    outputs = trainer([CAGrad(), TaskSAM()]).predict(model, data(12))
    expected = model.eval()(data(12).dataset.inputs)
    for task in "ab":
        predicted = torch.cat([part[task] for part in outputs])
        torch.testing.assert_close(predicted, expected[task])


def test_what_a_step_found_out() -> None:
    model = measured()
    fit(model, [CAGrad(), TaskSAM()])
    assert model.last_step.gram.shape == model.last_step.flat_gram.shape == (2, 2)
    assert set(model.last_step.losses) == {"a", "b"}
    fit(model)
    assert model.last_step.gram is None
