"""Calibration: its figures against a computation by hand, and that it only looks."""

import csv
import math
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import Calibration
from lightning_flatmtl.hosting.task_metrics import TaskMetrics
from tests.helpers import Calls, Pairs, assert_identical, fit, sgd, trainer

SIZE = 6
CLASSES = 3


def data(n: int = 30, seed: int = 0, batch_size: int = 8, missing: bool = False) -> DataLoader:
    """A class of three, a yes or no, and two values for every sample."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, SIZE, generator=g)
    kind = torch.randint(0, CLASSES, (n,), generator=g)
    yes = torch.randint(0, 2, (n, 1), generator=g).float()
    if missing:
        kind[::3], yes[1::3] = -1, math.nan
    targets = {"kind": kind, "yes": yes, "size": torch.randn(n, 2, generator=g)}
    return DataLoader(Pairs(x, targets), batch_size=batch_size)


def parts(dropout: float = 0.3) -> tuple[nn.Module, list[Task]]:
    torch.manual_seed(3)
    trunk = nn.Sequential(
        nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 5)
    )
    accuracy = {"accuracy": MulticlassAccuracy(CLASSES)}
    return trunk, [
        Task("kind", nn.Linear(5, CLASSES), nn.CrossEntropyLoss(), accuracy, missing=-1),
        Task("yes", nn.Linear(5, 1), nn.BCEWithLogitsLoss(), missing=math.nan),
        Task("size", nn.Linear(5, 2), nn.MSELoss()),
    ]


def module(kind: type = MultiTaskModule, dropout: float = 0.3, **settings: Any) -> Any:
    trunk, tasks = parts(dropout)
    return kind(trunk, tasks, optimizer=sgd, **settings)


class Existing(pl.LightningModule):
    """An ordinary module that knows nothing of the package but what its steps return."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.encoder, tasks = parts(dropout)
        self.heads = nn.ModuleDict({task.name: task.head for task in tasks})
        self.criteria = nn.ModuleDict({task.name: task.loss for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        return {task: head(features) for task, head in self.heads.items()}

    def labelled(self, batch: Any) -> dict[str, dict[str, Tensor]]:
        x, targets = batch
        return {"logits": self(x), "targets": targets}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs, targets = self(batch[0]), batch[1]
        losses = {task: self.criteria[task](outputs[task], targets[task]) for task in outputs}
        self.log("train/loss", sum(losses.values()), batch_size=8)
        return {"loss": sum(losses.values()), "losses": losses}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        found = self.labelled(batch)
        loss = self.criteria["size"](found["logits"]["size"], found["targets"]["size"])
        self.log("val/size/loss", loss, batch_size=len(batch[0]))
        return found

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.labelled(batch)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


HOSTS = {"module": module, "existing": Existing}
hosts = pytest.mark.parametrize("host", HOSTS)


# By hand, in numpy.


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def by_hand(z: Any, y: Any, n_bins: int = 10) -> dict[str, Any]:
    """The figures of logits with a column for each class, or with one column."""
    z, y = np.asarray(z, np.float64), np.asarray(y)
    keep = (y >= 0).reshape(len(y), -1).all(1)
    z, y = z[keep], y[keep].reshape(-1).astype(int)
    p = softmax(z if z.shape[1] > 1 else np.concatenate([0 * z, z], 1))
    if z.shape[1] > 1:
        confidence, hit = p.max(1), p.argmax(1) == y
        brier = ((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean()
    else:
        confidence, hit = p[:, 1], y == 1
        brier = ((p[:, 1] - y) ** 2).mean()
    ece, bins = 0.0, []
    for b in range(n_bins):
        high = np.inf if b == n_bins - 1 else (b + 1) / n_bins
        of_bin = (confidence >= b / n_bins) & (confidence < high)
        count = of_bin.sum()
        bins.append({"count": float(count)})
        if count:
            share, mean = hit[of_bin].mean(), confidence[of_bin].mean()
            bins[b] |= {"confidence": mean, "accuracy": share}
            ece += count / len(y) * abs(share - mean)
    return {"ece": ece, "brier": brier, "entropy": entropy(p), "bins": bins}


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum(1).mean())


class ByHand(pl.Callback):
    """At the end of every evaluation: the model on all data at once."""

    def __init__(self, loader: DataLoader, ood: Tensor | None = None, n_bins: int = 10) -> None:
        self.data, self.ood, self.n_bins = loader.dataset, ood, n_bins
        self.expected: list[dict[str, Any]] = []

    def on_validation_epoch_end(self, trainer, net):
        if trainer.sanity_checking:
            return
        assert not net.training
        found = {}
        with torch.no_grad():
            outputs = net(self.data.inputs)
            beyond = {} if self.ood is None else net(self.ood)
        for task in ("kind", "yes"):
            found[task] = by_hand(outputs[task], self.data.targets[task], self.n_bins)
            if beyond:
                z = beyond[task].double().numpy()
                p = softmax(z if task == "kind" else np.concatenate([0 * z, z], 1))
                found[task]["ood_entropy"] = entropy(p)
        self.expected.append(found)

    on_test_epoch_end = on_validation_epoch_end


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def of_epoch(path: Path, epoch: int, data: str = "val") -> dict[str, Any]:
    """What the file has of an epoch, in the form of :func:`by_hand`."""
    found: dict[str, Any] = {}
    for row in rows(path):
        if row["epoch"] == str(epoch) and row["data"] == data:
            of_task = found.setdefault(row["task"], {"bins": []})
            value = float(row["value"])
            if not row["bin"]:
                of_task[row["name"]] = value
                continue
            if row["name"] == "count":
                assert int(row["bin"]) == len(of_task["bins"])
                of_task["bins"].append({})
            of_task["bins"][-1][row["name"]] = value
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for task, of_task in expected.items():
        assert found[task].keys() == of_task.keys()
        for name, value in of_task.items():
            if name != "bins":
                assert found[task][name] == pytest.approx(value, abs=1e-6), (task, name)
        for mine, bin_ in zip(found[task]["bins"], of_task["bins"], strict=True):
            assert mine == pytest.approx(bin_, abs=1e-6), task


def logged(made: pl.Trainer, suffix: str = "") -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, value in made.callback_metrics.items():
        if name.startswith("calibration/") and name.endswith(suffix):
            task, figure = name.removeprefix("calibration/").removesuffix(suffix).split("/")
            found.setdefault(task, {})[figure] = value.item()
    return found


def without_bins(expected: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {t: {k: v for k, v in f.items() if k != "bins"} for t, f in expected.items()}


METHODS = {"none": list, "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)]}
OUTSIDE = 5 + torch.randn(21, SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_bins", [4, 10])
@hosts
def test_the_figures_are_those_of_a_computation_by_hand(host, method, n_bins, tmp_path) -> None:
    file, val = tmp_path / "new" / "calibration.csv", data(53, 1)
    hand = ByHand(val, OUTSIDE, n_bins)
    ood = DataLoader(TensorDataset(OUTSIDE), batch_size=4)
    looks = Calibration(n_bins=n_bins, ood=ood, csv=file)
    made = fit(HOSTS[host](), [*METHODS[method](), looks, hand], data(), val, max_epochs=3)
    assert len(hand.expected) == 3
    for epoch, expected in enumerate(hand.expected):
        assert_same(of_epoch(file, epoch), expected)
    last = without_bins(hand.expected[-1])
    for task, figures in logged(made).items():
        assert figures == pytest.approx(last[task], abs=1e-6)
    assert logged(made).keys() == last.keys() == {"kind", "yes"}
    assert [row["step"] for row in rows(file) if row["name"] == "ece"] == [
        *("4", "4", "8", "8", "12", "12")
    ]


def test_samples_without_a_label_are_left_out(tmp_path) -> None:
    file, val = tmp_path / "calibration.csv", data(53, 1, missing=True)
    hand = ByHand(val)
    fit(module(), [Calibration(csv=file), hand], data(), val)
    assert_same(of_epoch(file, 0), hand.expected[0])
    counts = [float(r["value"]) for r in rows(file) if r["task"] == "kind" and r["name"] == "count"]
    assert sum(counts) == (val.dataset.targets["kind"] >= 0).sum()


def test_an_existing_module_may_leave_labels_and_tasks_out(tmp_path) -> None:
    class Partial(Existing):
        def labelled(self, batch):
            found = super().labelled(batch)
            if self.second:
                found["logits"]["yes"] = None
                del found["targets"]["size"], found["logits"]["size"]
            return found

        def validation_step(self, batch, batch_idx):
            self.second = batch_idx == 1
            return None if batch_idx == 2 else self.labelled(batch)

    file, val = tmp_path / "calibration.csv", data(32, 1, missing=True)
    net = Partial()
    fit(net, [Calibration(csv=file)], data(), val, num_sanity_val_steps=0)
    sets, inputs = val.dataset.targets, val.dataset.inputs
    net.eval()
    with torch.no_grad():
        outputs = net(inputs)
    first = {"kind": [*range(16), *range(24, 32)], "yes": [*range(8), *range(24, 32)]}
    expected = {t: by_hand(outputs[t][keep], sets[t][keep]) for t, keep in first.items()}
    assert_same(of_epoch(file, 0), expected)


def test_a_data_set_for_each_task(tmp_path) -> None:
    file, whole = tmp_path / "calibration.csv", data(53, 1)
    sets, x = whole.dataset.targets, whole.dataset.inputs
    sizes = {"kind": 53, "yes": 20, "size": 11}

    def loaders() -> CombinedLoader:
        each = {
            t: DataLoader(list(zip(x[:n], sets[t][:n], strict=True)), batch_size=8)
            for t, n in sizes.items()
        }
        return CombinedLoader(each, "max_size")

    net = module()
    fit(net, [Calibration(csv=file)], CombinedLoader(loaders().iterables, "min_size"), loaders())
    net.eval()
    with torch.no_grad():
        outputs = net(x)
    expected = {t: by_hand(outputs[t][: sizes[t]], sets[t][: sizes[t]]) for t in ("kind", "yes")}
    assert_same(of_epoch(file, 0), expected)


def test_pixels_are_samples_and_ignored_ones_are_none(tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 1, 4, 4, generator=g)
    y = torch.randint(0, 3, (12, 4, 4), generator=g)
    y[:, 0] = 255
    y[:, 1, 0] = -100
    task = Task("seg", nn.Conv2d(2, 3, 1), nn.CrossEntropyLoss(ignore_index=255))

    class Ignores(MultiTaskModule):
        def task_loss(self, task, features, batch):
            logits, target = self.task_output(task, features), batch[1]["seg"]
            self.update_metrics(task, logits, target)
            return task.loss(logits, target.where(target != -100, 255))

    net = Ignores(nn.Conv2d(1, 2, 1), [task], sgd)
    loader = DataLoader(Pairs(x, {"seg": y}), batch_size=5)
    made = fit(net, [Calibration(csv=tmp_path / "c.csv")], loader, loader)
    with torch.no_grad():
        z = net(x)["seg"].movedim(1, -1).reshape(-1, 3)
    labels = torch.where(y == 255, -1, y).flatten()
    assert_same(of_epoch(tmp_path / "c.csv", 0), {"seg": by_hand(z, labels)})
    assert made.callback_metrics["calibration/seg/ece"] > 0


def test_a_module_that_overrides_losses_feeds_its_metrics() -> None:
    class Own(MultiTaskModule):
        def losses(self, batch, batch_idx):
            found = self(batch[0])
            for task in ("kind", "yes"):
                self.update_metrics(task, found[task], batch[1][task])
            return {
                task.name: task.loss(found[task.name], batch[1][task.name]) for task in self.tasks
            }

    val = data(53, 1)
    hand = ByHand(val)
    made = fit(module(Own), [Calibration(), hand], data(), val)
    for task, figures in without_bins(hand.expected[0]).items():
        assert logged(made)[task] == pytest.approx(figures, abs=1e-6)


@hosts
def test_the_test_data_and_several_loaders(host, tmp_path) -> None:
    file, net, sets = tmp_path / "c.csv", HOSTS[host](), [data(20, 1), data(33, 2)]
    looks = Calibration(csv=file)
    made = trainer([looks])
    made.fit(net, data(), sets[0])
    kept = rows(file)
    made.test(net, sets, verbose=False)
    assert rows(file)[: len(kept)] == kept
    with torch.no_grad():
        outputs = [net.eval()(loader.dataset.inputs) for loader in sets]
    for i, loader in enumerate(sets):
        targets = loader.dataset.targets
        expected = {t: by_hand(outputs[i][t], targets[t]) for t in ("kind", "yes")}
        assert_same(of_epoch(file, 1, f"test/{i}"), expected)
        for task, figures in without_bins(expected).items():
            assert logged(made, f"/dataloader_idx_{i}")[task] == pytest.approx(figures, abs=1e-6)


@pytest.mark.parametrize("stages", ["val", "test", ["test"]])
def test_only_the_stages_that_are_asked_for(stages) -> None:
    net, made = module(), trainer([Calibration(stages=stages)])
    made.fit(net, data(), data(20, 1))
    assert bool(logged(made)) is (stages == "val")
    made.test(net, data(20, 1), verbose=False)
    assert bool(logged(made)) is (stages != "val")


@hosts
def test_validation_without_a_fit(host, tmp_path) -> None:
    val, net = data(20, 1), HOSTS[host]()
    hand = ByHand(val)
    made = trainer([Calibration(csv=tmp_path / "c.csv"), hand])
    made.validate(net, val, verbose=False)
    assert_same(of_epoch(tmp_path / "c.csv", 0), hand.expected[0])
    assert logged(made).keys() == {"kind", "yes"}


@hosts
def test_it_logs_to_every_logger(host, tmp_path) -> None:
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    val = data(20, 1)
    hand = ByHand(val)
    fit(HOSTS[host](), [Calibration(), hand], data(), val, max_epochs=2, logger=loggers)
    for logger in loggers:
        table = [r for r in rows(Path(logger.log_dir) / "metrics.csv") if r["calibration/kind/ece"]]
        assert len(table) == 2
        for row, expected in zip(table, hand.expected, strict=True):
            for task, figures in without_bins(expected).items():
                for name, value in figures.items():
                    found = float(row[f"calibration/{task}/{name}"])
                    assert found == pytest.approx(value, abs=1e-6)


# It only looks.


class Noisy(Dataset):
    """Inputs out of domain that draw from all random streams."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(SIZE) + random.random() + float(np.random.rand())


class Diary(pl.Callback):
    """The random streams at the begin of every batch, and all that is logged."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        self.drawn.append((streams[0].tolist(), streams[1], streams[2].tolist()))
        assert not getattr(net, "listeners", [])


@pytest.mark.parametrize("method", METHODS)
@hosts
def test_training_is_the_same_bit_for_bit(host, method, tmp_path) -> None:
    nets, diaries, loggers, made = [], [], [], []
    for i in range(2):
        ood = DataLoader(Noisy(), batch_size=3, shuffle=True)
        looks = [Calibration(ood=ood, csv=tmp_path / "c.csv")] if i else []
        random.seed(1), np.random.seed(1)
        net, diary = HOSTS[host](), Diary()
        # Dropout draws in evaluation, too.
        net.encoder[2].register_forward_pre_hook(lambda layer, _: layer.train() and None)
        torch.manual_seed(7)
        loader = DataLoader(data().dataset, batch_size=8, shuffle=True)
        logger = CSVLogger(tmp_path / str(i))
        settings = {"max_epochs": 3, "logger": logger, "log_every_n_steps": 1}
        callbacks = [*METHODS[method](), *looks, diary]
        made.append(fit(net, callbacks, loader, data(20, 1), **settings))
        nets.append(net), diaries.append(diary.drawn), loggers.append(logger)
    assert_identical(*nets)
    assert len(diaries[0]) == 12
    assert diaries[0] == diaries[1]
    states = [net.state_dict() for net in nets]
    assert states[0].keys() == states[1].keys()
    plain, ours = (rows(Path(logger.log_dir) / "metrics.csv") for logger in loggers)
    for mine, theirs in zip(ours, plain, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("calibration/")} == theirs
    assert made[0].progress_bar_metrics == made[1].progress_bar_metrics
    assert [net.training for net in nets] == [True, True]


def test_it_has_nothing_to_do_in_training_steps() -> None:
    in_steps = [name for name in vars(pl.Callback) if "train_batch" in name or "backward" in name]
    in_steps += ["on_before_zero_grad", "on_before_optimizer_step"]
    assert len(in_steps) == 6
    for name in in_steps:
        assert getattr(Calibration, name) is getattr(pl.Callback, name)


@hosts
def test_the_model_does_not_run_again(host) -> None:
    counts = []
    for looks in ([], [Calibration()]):
        net = HOSTS[host]()
        calls = Calls(net.encoder)
        fit(net, looks, data(), data(20, 1), max_epochs=2)
        counts.append(calls.count)
    assert counts[0] == counts[1]


@hosts
def test_inputs_out_of_domain_leave_no_trace(host) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))
            self.calls = []

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            self.calls.append(len(x))
            return x

    nets = []
    for ood in (None, [OUTSIDE, OUTSIDE]):
        net = HOSTS[host]()
        net.encoder.append(Counts())
        fit(net, [Calibration(ood=ood)], data(), data(20, 1))
        nets.append(net)
    assert_identical(*nets)
    assert nets[0].encoder[-1].calls == nets[1].encoder[-1].calls


@hosts
def test_an_error_in_a_batch_leaves_nothing_behind(host) -> None:
    class Breaks(HOSTS[host] if host == "existing" else MultiTaskModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            raise RuntimeError("power cut")

    net = Breaks() if host == "existing" else module(Breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(net, [Calibration()], data(), data(20, 1))
    assert not getattr(net, "listeners", [])


# Inputs out of domain.


class WithOutside(pl.LightningDataModule):
    """Knows what is out of its domain."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[str] = []

    def prepare_data(self):
        self.prepared.append("prepare")

    def setup(self, stage):
        self.prepared.append(stage)

    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data(20, 1)

    def test_dataloader(self):
        return data(20, 1)

    def ood_dataloader(self):
        return DataLoader(OUTSIDE, batch_size=4)


class Other(pl.LightningDataModule):
    def setup(self, stage):
        self.inputs = OUTSIDE

    def test_dataloader(self):
        return DataLoader(list(zip(self.inputs, range(21), strict=True)), batch_size=4)


SOURCES = {
    "a loader of inputs": lambda: DataLoader(OUTSIDE, batch_size=4),
    "a loader with labels": lambda: DataLoader(
        TensorDataset(OUTSIDE, torch.arange(21)), batch_size=4
    ),
    "pairs": lambda: [(OUTSIDE[:5], {"kind": None}), (OUTSIDE[5:], {})],
    "a function": lambda: lambda: iter([OUTSIDE]),
    "a data module": WithOutside,
    "test data of another": Other,
}


@pytest.mark.parametrize("source", SOURCES)
@hosts
def test_sources_of_inputs_out_of_domain(host, source) -> None:
    val = data(20, 1)
    hand = ByHand(val, OUTSIDE)
    looks = Calibration(ood=SOURCES[source]())
    made = fit(HOSTS[host](), [looks, hand], data(), val, max_epochs=2)
    for task, figures in without_bins(hand.expected[-1]).items():
        assert logged(made)[task] == pytest.approx(figures, abs=1e-6)


@hosts
def test_the_data_module_or_the_module_may_have_them(host) -> None:
    hand = ByHand(data(20, 1), OUTSIDE)
    made = trainer([Calibration(), hand])
    made.fit(HOSTS[host](), datamodule=WithOutside())
    found = logged(made)["kind"]["ood_entropy"]
    assert found == pytest.approx(hand.expected[0]["kind"]["ood_entropy"], abs=1e-6)
    net = HOSTS[host]()
    net.ood_dataloader = WithOutside().ood_dataloader
    made = fit(net, [Calibration()], data(), data(20, 1))
    assert logged(made)["kind"]["ood_entropy"] == pytest.approx(found, abs=1e-6)


def test_only_so_many_batches() -> None:
    ood = DataLoader(OUTSIDE, batch_size=4)
    for settings, n in (({"ood_batches": 2}, 8), ({}, 4)):
        val = data(20, 1)
        hand = ByHand(val, OUTSIDE[:n])
        dev = {} if settings else {"fast_dev_run": 1}
        made = fit(module(), [Calibration(ood=ood, **settings), hand], data(), val, **dev)
        found = logged(made)["kind"]["ood_entropy"]
        assert found == pytest.approx(hand.expected[0]["kind"]["ood_entropy"], abs=1e-6)


def test_they_are_asked_for_once_an_evaluation() -> None:
    calls = []

    def source() -> Any:
        calls.append(1)
        return [OUTSIDE]

    fit(module(), [Calibration(ood=source)], data(), data(20, 1), max_epochs=2)
    assert len(calls) == 2  # not in the sanity check


@hosts
def test_a_predict_step_of_its_own_is_asked(host) -> None:
    class Own(MultiTaskModule if host == "module" else Existing):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("nowhere", 1.0)
            found = self(batch["x"])
            return {"logits": {"kind": found["kind"]}, "features": None}

    val = data(20, 1)
    hand = ByHand(val, OUTSIDE)
    net = module(Own) if host == "module" else Own()
    made = fit(net, [Calibration(ood=[{"x": OUTSIDE}]), hand], data(), val)
    expected = hand.expected[0]["kind"]["ood_entropy"]
    assert logged(made)["kind"]["ood_entropy"] == pytest.approx(expected, abs=1e-6)
    assert "ood_entropy" not in logged(made)["yes"]
    assert "nowhere" not in made.callback_metrics


# Files.


def test_a_resumed_fit_goes_on_where_it_was(tmp_path) -> None:
    half, whole, parts = (tmp_path / name for name in ("half.ckpt", "whole.csv", "parts.csv"))

    def run(file: Path, epochs: int, ckpt: Any = None) -> pl.Trainer:
        net, looks = module(dropout=0.0), Calibration(csv=file)
        return fit(net, [looks], data(), data(20, 1), max_epochs=epochs, ckpt_path=ckpt)

    run(whole, 4)
    run(parts, 2).save_checkpoint(half)
    run(parts, 3, half)
    # Once more from the same place: the rows of the third epoch are not there twice.
    run(parts, 4, half)
    assert whole.read_text("utf-8") == parts.read_text("utf-8")
    run(parts, 1)
    assert {row["epoch"] for row in rows(parts)} == {"0"}


@pytest.mark.parametrize("ood", [None, [OUTSIDE]])
def test_it_draws_pictures(ood, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    looks = Calibration(ood=ood, png=str(tmp_path / "new" / "c.png"))
    net, made = module(), trainer([looks])
    made.fit(net, data(), data(20, 1))
    made.test(net, [data(20, 1), data(20, 2)], verbose=False)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["c.png", "c_test_0.png", "c_test_1.png"]
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_of_many_tasks_the_worst_are_drawn(monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from lightning_flatmtl.callbacks import _calibration_picture as picture

    drawn = []
    monkeypatch.setattr(picture, "_draw_task", lambda finding, part: drawn.append(finding))
    g = torch.Generator().manual_seed(0)
    names = [f"t{i}" for i in range(14)]
    sets = {name: torch.randint(0, 2, (20,), generator=g) for name in names}
    loader = DataLoader(Pairs(torch.randn(20, SIZE, generator=g), sets), batch_size=10)
    tasks = [Task(name, nn.Linear(SIZE, 2), nn.CrossEntropyLoss()) for name in names]
    made = trainer([Calibration(png=tmp_path / "c.png", stages="val")])
    made.validate(MultiTaskModule(nn.Identity(), tasks, sgd), loader, verbose=False)
    errors = {task: figures["ece"] for task, figures in logged(made).items()}
    worst = sorted(errors, key=lambda task: -errors[task])[:12]
    assert [finding.task for finding in drawn] == [name for name in names if name in worst]


def test_a_broken_fit_has_its_picture_too(tmp_path) -> None:
    pytest.importorskip("matplotlib")

    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer, net):
            if trainer.current_epoch == 1:
                raise RuntimeError("power cut")

    looks = Calibration(png=tmp_path / "c.png")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module(), [looks, Breaks()], data(), data(20, 1), max_epochs=2)
    assert (tmp_path / "c.png").exists()


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch) -> None:
    monkeypatch.setattr("lightning_flatmtl.callbacks._pictures.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[plots\]"'):
        Calibration(png="c.png")
    Calibration(csv="c.csv")  # needs none


# Which tasks.


@hosts
def test_tasks_by_name(host) -> None:
    for tasks in (["yes"], {"yes": "binary"}):
        made = fit(HOSTS[host](), [Calibration(tasks)], data(), data(20, 1))
        assert logged(made).keys() == {"yes"}


@hosts
def test_a_task_that_is_no_classification_is_refused_by_name(host) -> None:
    message = "must be classifications, got 'size' with predictions of shape .8, 2. and type"
    net = HOSTS[host]()
    with pytest.raises(MisconfigurationException, match=message):
        fit(net, [Calibration(["kind", "size"])], data(), data(20, 1))


def test_integers_that_count_something_are_no_classes() -> None:
    loader = data(20, 1)
    loader.dataset.targets["size"] = torch.arange(40).view(20, 2)
    net = Existing()
    net.criteria["size"] = nn.L1Loss()
    made = fit(net, [Calibration()], data(), loader)
    assert logged(made).keys() == {"kind", "yes"}


@hosts
def test_unknown_tasks_are_refused(host) -> None:
    with pytest.raises(MisconfigurationException, match="got 'knd' beside .* mean 'kind'"):
        fit(HOSTS[host](), [Calibration(["yes", "knd"])], data(), data(20, 1))


@hosts
def test_labels_of_no_class_are_refused(host) -> None:
    loader = data(20, 1)
    loader.dataset.targets["kind"][15] = 3
    message = "expects labels from 0 to 2 of the multiclass task 'kind', got 3"
    net = HOSTS[host]()
    if host == "module":
        net.tasks[0].loss = lambda p, y: p.square().mean()
        net.task_metrics = TaskMetrics([])
    with pytest.raises(MisconfigurationException, match=message):
        fit(net, [Calibration()], data(), loader, num_sanity_val_steps=-1)


def test_other_classes_in_a_later_batch_are_refused() -> None:
    class Grows(Existing):
        def labelled(self, batch):
            found = super().labelled(batch)
            if len(batch[0]) < 8:
                found["logits"]["kind"] = found["logits"]["kind"][:, :2]
                found["targets"]["kind"] = found["targets"]["kind"].clamp(max=1)
            return found

    message = "task 'kind' to have the same classes in every batch, got multiclass logits of 2"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Grows(), [Calibration()], data(), data(20, 1), num_sanity_val_steps=-1)


@hosts
def test_probabilities_are_refused(host) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    net = HOSTS[host]()
    net.heads["kind"] = nn.Sequential(net.heads["kind"], nn.Softmax(1))
    with pytest.raises(MisconfigurationException, match="got probabilities from task 'kind'"):
        fit(net, [Calibration()], data(), data(20, 1))
    net = HOSTS[host]()
    net.heads["kind"] = nn.Sequential(net.heads["kind"], nn.Softmax(1), Log())
    assert "kind" in logged(fit(net, [Calibration()], data(), data(20, 1)))


@pytest.mark.parametrize("returned", [3.0, {"loss": 1.0}, {"logits": {}, "targets": 1}])
def test_an_existing_module_is_told_what_to_return(returned) -> None:
    class Silent(Existing):
        def validation_step(self, batch, batch_idx):
            return torch.tensor(returned) if isinstance(returned, float) else returned

    message = r"must return {\"logits\": {task: logits}, \"targets\": {task: labels}}, got"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Silent(), [Calibration()], data(), data(20, 1))


@pytest.mark.parametrize("host", [*HOSTS])
def test_nothing_to_be_seen_is_refused(host) -> None:
    class Silent(MultiTaskModule if host == "module" else Existing):
        def validation_step(self, batch, batch_idx):
            return None

    net = module(Silent) if host == "module" else Silent()
    words = "Call `self.update_metrics" if host == "module" else "`validation_step` .* must return"
    with pytest.raises(MisconfigurationException, match=f"no predictions in a whole .*{words}"):
        fit(net, [Calibration()], data(), data(20, 1))


@hosts
def test_no_classification_at_all_is_refused(host) -> None:
    loader = data(20, 1)
    net = HOSTS[host]()
    for task in ("kind", "yes"):
        del net.heads[task]
    if host == "module":
        net.tasks = net.tasks[2:]
    training = data()
    for each in (loader, training):
        each.dataset.targets = {"size": each.dataset.targets["size"]}
    with pytest.raises(MisconfigurationException, match="expects a classification among the tasks"):
        fit(net, [Calibration()], training, loader)


class Mute(Existing):
    def forward(self, x):
        return (self.encoder(x),)

    def labelled(self, batch):
        return {"logits": Existing.forward(self, batch[0]), "targets": batch[1]}

    def training_step(self, batch, batch_idx):
        return sum(v.square().mean() for v in Existing.forward(self, batch[0]).values())


@pytest.mark.parametrize(
    ("make", "ood", "message"),
    [
        (Mute, [OUTSIDE], r"`forward\(inputs\)` of Mute must return {task: logits}, got .* tuple"),
        (module, lambda: 3, "must give an iterable of batches, such as a data loader, got int"),
    ],
)
def test_bad_predictions_out_of_domain_are_refused(make, ood, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(make(), [Calibration(ood=ood)], data(), data(20, 1))


@hosts
def test_other_names_and_shapes_out_of_domain_are_refused(host) -> None:
    class Own(MultiTaskModule if host == "module" else Existing):
        answer: Any = None

        def predict_step(self, batch, batch_idx):
            return self.answer

    for answer, message in (
        ({"kynd": OUTSIDE}, r"predictions of the tasks \['kind', 'yes'\] out of domain, got"),
        ({"kind": OUTSIDE}, r"logits \[n, 3, \.\.\.\] of task 'kind' out of domain, .* \[21, 6\]"),
    ):
        net = module(Own) if host == "module" else Own()
        net.answer = answer
        with pytest.raises(MisconfigurationException, match=message):
            fit(net, [Calibration(ood=[OUTSIDE])], data(), data(20, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "kind"}, "`tasks` must be names of tasks, .* got 'kind'"),
        ({"tasks": []}, r"`tasks` must be names of tasks, .* got \[\]"),
        ({"tasks": {"a": "ordinal"}}, r"`tasks\['a'\]` must be 'binary' .* got 'ordinal'"),
        ({"n_bins": 0}, "`n_bins` must be an integer >= 1, got 0"),
        ({"n_bins": math.nan}, "`n_bins` must be an integer >= 1, got nan"),
        ({"stages": "train"}, "`stages` must be 'val', 'test' or both, got 'train'"),
        ({"stages": []}, r"`stages` must be 'val', 'test' or both, got \[\]"),
        ({"ood": 3}, "`ood` must be a data loader, a data module, or a function .* got 3"),
        ({"ood": iter([])}, "`ood` must be a data loader"),
        ({"ood": WithOutside}, "`ood` must be a data loader"),
        ({"ood_batches": 0}, "`ood_batches` must be an integer >= 1, got 0"),
        ({"csv": "c.txt"}, "`csv` must be the path of a .csv file, got 'c.txt'"),
        ({"png": 3}, "`png` must be the path of a .png file, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(**settings)


def test_it_is_pickled_and_found_by_its_class_name() -> None:
    from jsonargparse import ArgumentParser

    import lightning_flatmtl.cli  # noqa: F401

    assert pickle.loads(pickle.dumps(Calibration(n_bins=7))).n_bins == 7
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    ood = {"class_path": "lightning_flatmtl.data.MultiDigits", "init_args": {"seed": 4}}
    init = {"csv": "a.csv", "n_bins": 5, "ood": ood, "tasks": {"left": "multiclass"}}
    given = {"class_path": "Calibration", "init_args": init | {"stages": "test"}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, Calibration)
    assert (made.n_bins, made.ood.seed, made.stages) == (5, 4, ("test",))
    given["init_args"] = {"tasks": ["left", "right"], "stages": ["val", "test"]}
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert made.tasks == {"left": None, "right": None}
