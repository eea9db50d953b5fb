"""Lightning's callbacks, loggers, progress bars, profilers and tuners beside a method."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from torch.utils.data import DataLoader

from tests.features import (
    BATCHES,
    HOSTS,
    SUMS,
    Callbacks,
    active,
    assert_same_run,
    assert_trained,
    loader,
    run,
)
from tests.test_parity import company, files, onecycle, rows

paths = pytest.mark.parametrize("path", SUMS)
hosts = pytest.mark.parametrize("host", HOSTS)

AVERAGES = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.05, 0.5, annealing_epochs=1),
    "WeightAveraging": lambda: WeightAveraging(avg_fn=lambda old, new, n: 0.5 * (old + new)),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
}


@paths
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights(average: str, path: str, first: bool) -> None:
    """Before and after our callbacks: some copy the module in their ``setup``."""
    plain = run("take-over", [AVERAGES[average]()], max_epochs=4)
    callbacks = [AVERAGES[average](), *SUMS[path]()]
    ours = run("take-over", callbacks if first else callbacks[::-1], max_epochs=4)
    assert_same_run(ours, plain)


@hosts
@pytest.mark.parametrize("average", ["WeightAveraging", "EMAWeightAveraging"])
def test_a_method_with_averages_of_weights(host: str, average: str) -> None:
    assert_trained(run(host, [AVERAGES[average](), *active()]))


def test_stochastic_weight_averaging() -> None:
    assert_trained(
        run("take-over", [AVERAGES["StochasticWeightAveraging"](), *active()], max_epochs=4)
    )
    with pytest.raises(MisconfigurationException, match=r"Use .*\.WeightAveraging instead"):
        run("module", [AVERAGES["StochasticWeightAveraging"](), *active()])


def accompanied(host: str, callbacks: Callbacks, folder: Path, **settings: Any) -> pl.Trainer:
    """A run with early stopping, checkpoints that monitor ``val/loss``, and learning rates."""
    settings = {
        "configure": onecycle,
        "max_epochs": 12,
        "logger": CSVLogger(folder, ""),
        "log_every_n_steps": 1,
        "enable_checkpointing": True,
        **settings,
    }
    return run(host, [*callbacks, *company(folder)], **settings)


@paths
def test_company(tmp_path: Path, path: str) -> None:
    ours = accompanied("take-over", SUMS[path](), tmp_path / "ours")
    plain = accompanied("take-over", [], tmp_path / "plain")
    assert plain.current_epoch < 12  # stopped early
    assert_same_run(ours, plain)
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    found, expected = rows(tmp_path / "ours"), rows(tmp_path / "plain")
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert (value == "") == (other[key] == ""), (row, other)
            assert not value or float(value) == pytest.approx(float(other[key]), rel=1e-10), key


@hosts
def test_a_method_in_company(tmp_path: Path, host: str) -> None:
    ours = accompanied(host, active(), tmp_path)
    assert_trained(ours)
    (lr,) = (c for c in ours.callbacks if isinstance(c, LearningRateMonitor))
    assert lr.lrs.keys() == {"lr-SGD"}
    assert len(files(tmp_path)) > 4


@hosts
def test_a_monitor_with_a_slash(tmp_path: Path, host: str) -> None:
    def checkpoints(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(
            folder, "{epoch}-{val/b/loss:.2f}", "val/b/loss", auto_insert_metric_name=False
        )

    for callbacks, name in ((active(), "active"), (SUMS["gradients"](), "sum"), ([], "plain")):
        best = checkpoints(tmp_path / name)
        stop = EarlyStopping("val/b/loss", patience=1)
        used = host if callbacks else "take-over"
        run(used, [*callbacks, best, stop], max_epochs=6, enable_checkpointing=True)
        assert best.best_model_score == best.best_k_models[best.best_model_path]
    assert files(tmp_path / "sum") == files(tmp_path / "plain")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@hosts
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard(tmp_path: Path, host: str) -> None:
    pytest.importorskip("tensorboard")
    written = []
    for used, callbacks in ((host, SUMS["gradients"]()), ("take-over", [])):
        folder = tmp_path / f"{used}{len(callbacks)}"
        run(used, callbacks, logger=TensorBoardLogger(folder, ""), log_every_n_steps=1)
        written.append(scalars(folder))
    assert written[0].keys() == written[1].keys()
    assert "train/b/loss" in written[0]
    for tag, values in written[1].items():
        assert [step for step, _ in written[0][tag]] == [step for step, _ in values]
        assert [v for _, v in written[0][tag]] == pytest.approx([v for _, v in values])


@hosts
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars(host: str, bar: type, capsys: pytest.CaptureFixture) -> None:
    shown = []
    for used, callbacks in ((host, active()), ("take-over", [])):
        done = run(used, [*callbacks, bar()], enable_progress_bar=True)
        metrics = done.progress_bar_callback.get_metrics(done, done.lightning_module)
        shown.append(set(metrics))
    assert shown[0] == shown[1] >= {"train/loss", "val/loss"}
    assert "Epoch 1" in "".join(capsys.readouterr())


@hosts
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler])
def test_profilers(host: str, profiler: type, tmp_path: Path) -> None:
    assert_trained(run(host, active(), profiler=profiler(tmp_path, "profile")))
    assert "training_step" in (tmp_path / "fit-profile.txt").read_text()


def rate(self):
    return torch.optim.SGD(self.parameters(), lr=self.lr)


class HasRate:
    lr = 0.1


@hosts
def test_learning_rate_finder(host: str, tmp_path: Path) -> None:
    settings = {"configure": rate, "mixin": HasRate, "default_root_dir": tmp_path, "max_epochs": 6}
    results = []
    for used, callbacks in ((host, SUMS["gradients"]()), (host, active()), ("take-over", [])):
        finder = LearningRateFinder(num_training_steps=25, early_stop_threshold=None)
        done = run(used, [*callbacks, finder], **settings)
        results.append((done, finder.optimal_lr))
    (ours, found), (method, found_by_method), (plain, expected) = results
    assert found.results["loss"] == pytest.approx(expected.results["loss"], rel=1e-9)
    assert found.suggestion() == expected.suggestion()
    assert ours.lightning_module.lr == plain.lightning_module.lr != 0.1
    assert_same_run(ours, plain)
    # The search itself trains with the method, and so finds other losses.
    assert found_by_method.results["loss"] != pytest.approx(expected.results["loss"], rel=1e-3)
    assert_trained(method)


class Batches(pl.LightningDataModule):
    """Batches of a size that the tuner may change."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(16, 1)


class Trials:
    """Counts how often the encoder runs in training while the finder tries sizes."""

    count = 0

    def __call__(self, model: Any) -> None:
        def note(*_: Any) -> None:
            trying = not any(isinstance(c, BatchSizeFinder) for c in model.trainer.callbacks)
            self.count += trying and model.training

        model.encoder.register_forward_hook(note)


@hosts
def test_batch_size_finder(host: str, tmp_path: Path) -> None:
    found = []
    for used, callbacks in ((host, SUMS["gradients"]()), (host, active()), ("take-over", [])):
        batches, trials = Batches(), Trials()
        finder = BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2)
        settings = {"default_root_dir": tmp_path, "batches": batches, "prepare": trials}
        done = run(used, [*callbacks, finder], **settings)
        assert finder.optimal_batch_size == batches.batch_size == 8
        assert done.global_step == 2 * BATCHES
        found.append((done, trials.count))
    (ours, count), (method, count_of_method), (plain, expected) = found
    assert_same_run(ours, plain)
    assert count == expected > 0
    assert count_of_method > expected  # the trials have second passes too
    assert_trained(method)


def test_checkpoints_by_time(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, train_time_interval=timedelta(microseconds=1))
    run("take-over", [*active(), every], enable_checkpointing=True)
    assert files(tmp_path)
