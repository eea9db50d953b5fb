"""Without a method, and with TaskSAM(rho=0), a MultiTaskModule trains as plain Lightning does."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.cli import ReduceLROnPlateau as PlateauWithMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad, LinearScalarization
from tests.helpers import Calls, assert_close, data, fit, module, sgd, trainer

METHODS = {"none": list, "LS with rho 0": lambda: [LinearScalarization(), TaskSAM(rho=0.0)]}
BATCHES = 5


class Plain(pl.LightningModule):
    """The closest ordinary LightningModule: automatic optimization on the summed loss."""

    def __init__(self, twin: MultiTaskModule) -> None:
        super().__init__()
        self.encoder, self.heads = twin.encoder, twin.heads
        self.criteria = nn.ModuleDict({task.name: task.loss for task in twin.tasks})

    def losses(self, batch):
        features = self.encoder(batch[0])
        return {t: self.criteria[t](head(features), batch[1][t]) for t, head in self.heads.items()}

    def run(self, stage: str, batch):
        losses = self.losses(batch)
        total = losses["a"] + losses["b"]
        self.log(f"{stage}/loss", total, prog_bar=True, batch_size=len(batch[0]))
        for task, loss in losses.items():
            self.log(f"{stage}/{task}/loss", loss, batch_size=len(batch[0]))
        return total

    def training_step(self, batch, batch_idx):
        return self.run("train", batch)

    def validation_step(self, batch, batch_idx):
        self.run("val", batch)

    def test_step(self, batch, batch_idx):
        self.run("test", batch)


# What `configure_optimizers` returns, in all of Lightning's forms; they are mixed into both twins.


def onecycle(self):
    optimizer = sgd(self.parameters())
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=self.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def onecycle_lists(self):
    optimizer = sgd(self.parameters())
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=4 * BATCHES)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def every_other_step(self):
    optimizer = sgd(self.parameters())
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 2}]


def every_other_epoch(self):
    optimizer = sgd(self.parameters())
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "frequency": 2},
    }


def bare_scheduler(self):
    optimizer = sgd(self.parameters())
    return ([optimizer], StepLR(optimizer, 1, 0.5))


def two_schedulers(self):
    optimizer = sgd(self.parameters())
    falling = StepLR(optimizer, 1, 0.5)
    watching = {"scheduler": plateau_of(optimizer), "monitor": "val/b/loss"}
    return [optimizer], [falling, watching]


def plateau_of(optimizer, **kwargs):
    """Strikes whenever the watched value does not halve."""
    return ReduceLROnPlateau(optimizer, patience=0, factor=0.3, threshold=0.5, **kwargs)


def plateau(self):
    optimizer = sgd(self.parameters())
    scheduler = {"scheduler": plateau_of(optimizer), "monitor": "val/loss"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def plateau_outer_monitor(self):
    optimizer = sgd(self.parameters())
    return {
        "optimizer": optimizer,
        "lr_scheduler": plateau_of(optimizer),
        "monitor": "train/loss",
    }


def plateau_lists(self):
    optimizer = sgd(self.parameters())
    return [optimizer], [{"scheduler": plateau_of(optimizer), "monitor": "val/a/loss"}]


def plateau_in_a_list_of_dicts(self):
    optimizer = sgd(self.parameters())
    scheduler = {"scheduler": plateau_of(optimizer), "monitor": "val/loss", "frequency": 2}
    return [{"optimizer": optimizer, "lr_scheduler": scheduler}]


def plateau_steps(self):
    optimizer = sgd(self.parameters())
    scheduler = {
        "scheduler": plateau_of(optimizer),
        "monitor": "val/loss",
        "interval": "step",
        "frequency": 2,
    }
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def plateau_train_steps(self):
    optimizer = sgd(self.parameters())
    scheduler = {"scheduler": plateau_of(optimizer), "monitor": "train/loss", "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def groups(self):
    return torch.optim.SGD(
        [
            {"params": self.encoder.parameters(), "lr": 0.1},
            {"params": self.heads.parameters(), "lr": 0.02, "momentum": 0.9},
        ]
    )


def adam(self):
    return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)


CONFIGURATIONS = [
    onecycle,
    onecycle_lists,
    every_other_step,
    every_other_epoch,
    bare_scheduler,
    two_schedulers,
    plateau,
    plateau_outer_monitor,
    plateau_lists,
    plateau_in_a_list_of_dicts,
    plateau_steps,
    plateau_train_steps,
    groups,
    adam,
]


def twins(configure=None, mixin: type = object, **kwargs: Any) -> tuple[MultiTaskModule, Plain]:
    """The same net as a MultiTaskModule and as a plain module, in float64."""
    body = {"configure_optimizers": configure or (lambda self: sgd(self.parameters()))}
    mix = type("Mix", (mixin,), body)
    ours = module(kind=type("Ours", (mix, MultiTaskModule), {}), **kwargs)
    plain = type("PlainMixed", (mix, Plain), {})(module())
    return ours, plain


def run_both(
    configure=None,
    method=list,
    module_kwargs: dict[str, Any] | None = None,
    plain_kwargs: dict[str, Any] | None = None,
    mixin: type = object,
    **both: Any,
) -> tuple[pl.Trainer, pl.Trainer]:
    """Train both twins for two epochs with validation, compare, return the Trainers."""
    ours, plain = twins(configure, mixin, **(module_kwargs or {}))
    settings = {"max_epochs": 2, "num_sanity_val_steps": 1, **both}
    val = data(16, seed=1)
    first = fit(ours, method(), data(8 * BATCHES), val, **settings)
    second = fit(plain, [], data(8 * BATCHES), val, **settings, **(plain_kwargs or {}))
    assert_equal_runs(first, second)
    return first, second


def rates(of: pl.Trainer) -> list[float]:
    return [group["lr"] for group in of.optimizers[0].param_groups]


def assert_equal_runs(first: pl.Trainer, second: pl.Trainer) -> None:
    ours, plain = first.lightning_module, second.lightning_module
    assert_close(ours.encoder, plain.encoder, 1e-12)
    assert_close(ours.heads, plain.heads, 1e-12)
    assert first.global_step == second.global_step
    assert first.current_epoch == second.current_epoch
    assert rates(first) == pytest.approx(rates(second), rel=1e-12)
    shared = second.callback_metrics.keys()
    assert first.callback_metrics.keys() == shared
    for name in shared:
        values = first.callback_metrics[name], second.callback_metrics[name]
        torch.testing.assert_close(*values, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_plain(method: str) -> None:
    first, _ = run_both(method=METHODS[method])
    assert first.global_step == 2 * BATCHES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("value", "algorithm"), [(0.1, "norm"), (0.01, "value"), (0.0, "norm")])
def test_clipping(method: str, value: float, algorithm: str) -> None:
    clip = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}
    run_both(method=METHODS[method], module_kwargs=clip, plain_kwargs=clip)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [2, 3])
def test_accumulation_with_a_short_last_group(method: str, share: int) -> None:
    accumulate = {"accumulate_grad_batches": share}
    first, _ = run_both(method=METHODS[method], module_kwargs=accumulate, plain_kwargs=accumulate)
    assert first.global_step == 2 * -(-BATCHES // share)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("configure", CONFIGURATIONS)
def test_optimizers_and_schedulers(method: str, configure) -> None:
    settings = {"val_check_interval": 2} if configure is plateau_steps else {}
    first, _ = run_both(configure, METHODS[method], max_epochs=4, **settings)
    if configure not in (groups, adam):
        assert rates(first) != [0.1]  # the scheduler has done something


@pytest.mark.parametrize("configure", [onecycle, every_other_step, plateau_train_steps])
def test_schedulers_with_accumulation(configure) -> None:
    accumulate = {"accumulate_grad_batches": 2}
    run_both(configure, module_kwargs=accumulate, plain_kwargs=accumulate)


@pytest.mark.parametrize(
    ("scheduler", "config", "configure"),
    [
        (
            partial(OneCycleLR, max_lr=0.2, total_steps=4 * BATCHES),
            {"interval": "step"},
            onecycle_lists,
        ),
        (partial(StepLR, step_size=1, gamma=0.5), {"frequency": 2}, every_other_epoch),
        (plateau_of, {"monitor": "val/loss"}, plateau),
        (
            partial(PlateauWithMonitor, monitor="val/loss", patience=0, factor=0.3, threshold=0.5),
            None,
            plateau,
        ),
    ],
)
def test_schedulers_by_arguments(scheduler, config, configure) -> None:
    ours = module(lr_scheduler=scheduler, lr_scheduler_config=config)
    _, plain = twins(configure)
    settings = {"max_epochs": 2, "loader": data(8 * BATCHES), "val": data(16, seed=1)}
    assert_equal_runs(fit(ours, **settings), fit(plain, **settings))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 3, "max_epochs": -1},
        {"max_steps": 7, "max_epochs": -1},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"overfit_batches": 2},
        {"fast_dev_run": True},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2},
        {"min_steps": 12, "max_steps": 12, "max_epochs": -1},
    ],
)
@pytest.mark.parametrize("configure", [every_other_epoch, plateau])
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_limits(limits: dict[str, Any], configure) -> None:
    if configure is plateau and ("check_val_every_n_epoch" in limits or "max_steps" in limits):
        configure = plateau_outer_monitor
    accumulate = {"accumulate_grad_batches": 2}
    run_both(configure, module_kwargs=accumulate, plain_kwargs=accumulate, **limits)


class Lenient:
    def configure_optimizers(self):
        optimizer = sgd(self.parameters())
        entry = {"scheduler": plateau_of(optimizer), "monitor": "val/loose", "strict": self.strict}
        return {"optimizer": optimizer, "lr_scheduler": entry}


@pytest.mark.parametrize("base", [MultiTaskModule, Plain])
def test_missing_monitor(base: type) -> None:
    kind = type("Lenient" + base.__name__, (Lenient, base), {})
    model = module(kind=kind) if base is MultiTaskModule else kind(module())
    model.strict = False
    with pytest.warns(RuntimeWarning, match=r"ReduceLROnPlateau.*val/loose"):
        done = fit(model, val=data(8))
    assert rates(done) == [0.1]
    model.strict = True
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="val/loose"):
        fit(model, val=data(8))


class Recorder:
    """Counts the hooks around a step and changes what they do."""

    def on_before_zero_grad(self, optimizer):
        self.calls["on_before_zero_grad"] += 1

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.calls["optimizer_zero_grad"] += 1
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss):
        self.calls["backward"] += 1
        loss.backward()

    def on_after_backward(self):
        self.calls["on_after_backward"] += 1

    def on_before_optimizer_step(self, optimizer):
        self.calls["on_before_optimizer_step"] += 1

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.calls["configure_gradient_clipping"] += 1
        self.clip_gradients(optimizer, 0.05, "norm")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.calls["optimizer_step"] += 1
        for group in optimizer.param_groups:  # a warm-up, as Lightning's documentation has it
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler, metric):
        self.calls["lr_scheduler_step"] += 1
        super().lr_scheduler_step(scheduler, metric)

    @property
    def calls(self) -> Counter:
        return self.__dict__.setdefault("counted", Counter())


class Watcher(pl.Callback):
    """Counts the hooks that callbacks get around a step."""

    def __init__(self) -> None:
        self.calls: Counter = Counter()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls["on_before_zero_grad"] += 1

    def on_before_backward(self, trainer, pl_module, loss):
        self.calls["on_before_backward"] += 1

    def on_after_backward(self, trainer, pl_module):
        self.calls["on_after_backward"] += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.calls["on_before_optimizer_step"] += 1


@pytest.mark.parametrize("share", [1, 2])
def test_overridden_hooks(share: int) -> None:
    watchers = Watcher(), Watcher()
    ours, plain = twins(every_other_epoch, Recorder, accumulate_grad_batches=share)
    loader = data(8 * BATCHES)
    first = fit(ours, [watchers[0]], loader, max_epochs=2)
    second = fit(plain, [watchers[1]], loader, max_epochs=2, accumulate_grad_batches=share)
    assert_equal_runs(first, second)
    assert ours.calls == plain.calls
    assert watchers[0].calls == watchers[1].calls


class SkipsTheRest:
    """Leaves each epoch after three batches."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


@pytest.mark.parametrize("configure", [every_other_epoch, plateau_outer_monitor, every_other_step])
def test_skipping_the_rest_of_an_epoch(configure) -> None:
    accumulate = {"accumulate_grad_batches": 2}
    run_both(
        configure,
        mixin=SkipsTheRest,
        module_kwargs=accumulate,
        plain_kwargs=accumulate,
        max_epochs=4,
    )


def rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as f:
        return list(csv.DictReader(f))


def company(folder: Path) -> list[pl.Callback]:
    return [
        EarlyStopping("val/loss", patience=1, min_delta=0.05),
        LearningRateMonitor(),
        ModelCheckpoint(
            folder / "best", "{epoch}-{step}", "val/loss", save_top_k=2, save_last=True
        ),
        ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(folder / "epochs", "{epoch}", every_n_epochs=2, save_top_k=-1),
    ]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("configure", [onecycle, plateau, every_other_step])
def test_callbacks_and_loggers(tmp_path: Path, configure) -> None:
    trainers = []
    for name, model in zip(("ours", "plain"), twins(configure), strict=True):
        folder = tmp_path / name
        trainers.append(
            fit(
                model,
                company(folder),
                data(8 * BATCHES),
                data(16, seed=1),
                max_epochs=12,
                logger=CSVLogger(folder, ""),
                log_every_n_steps=1,
                enable_checkpointing=True,
            )
        )
    assert_equal_runs(*trainers)
    assert trainers[0].current_epoch < 12  # stopped early
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    assert len(files(tmp_path / "ours")) > 4
    for name in sorted(files(tmp_path / "ours"))[::3]:
        saved = [load(tmp_path / who / name) for who in ("ours", "plain")]
        if configure is not plateau:  # plain Lightning saves one before its step, and loses it
            assert saved[0]["lr_schedulers"] == saved[1]["lr_schedulers"]
        for key, value in saved[1]["state_dict"].items():
            torch.testing.assert_close(saved[0]["state_dict"][key], value, rtol=1e-12, atol=1e-14)
    assert trainers[0].progress_bar_metrics.keys() == trainers[1].progress_bar_metrics.keys()
    ours, plain = rows(tmp_path / "ours"), rows(tmp_path / "plain")
    assert len(ours) == len(plain)
    for row, other in zip(ours, plain, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert (value == "") == (other[key] == ""), (row, other)
            if value:
                assert float(value) == pytest.approx(float(other[key]), rel=1e-10), key


def test_loggers_count_updates_under_accumulation(tmp_path: Path) -> None:
    ours, plain = twins(accumulate_grad_batches=2)
    settings = {"loader": data(8 * BATCHES), "max_epochs": 2, "log_every_n_steps": 1}
    first = fit(ours, logger=CSVLogger(tmp_path / "ours", ""), **settings)
    fit(plain, logger=CSVLogger(tmp_path / "plain", ""), accumulate_grad_batches=2, **settings)
    # A row for each batch, where plain Lightning has one for the last batch of each update.
    last = {row["step"]: row for row in rows(tmp_path / "ours")}
    expected = {row["step"]: row for row in rows(tmp_path / "plain")}
    assert last.keys() == expected.keys()
    for step, row in expected.items():
        assert float(last[step]["train/loss"]) == pytest.approx(float(row["train/loss"]))
    assert first.accumulate_grad_batches == 1  # given back, so that the Trainer can fit again


def test_weight_averaging() -> None:
    trainers = []
    for model in twins():
        average = EMAWeightAveraging(decay=0.9)
        trainers.append(fit(model, [average], data(8 * BATCHES), data(16), max_epochs=2))
    assert_equal_runs(*trainers)


def test_lr_find(tmp_path: Path) -> None:
    found = []
    for model in twins():
        model.lr = 0.1
        finder = Tuner(trainer(max_epochs=3, default_root_dir=tmp_path)).lr_find(
            model, data(8 * BATCHES), num_training=8, early_stop_threshold=None, update_attr=False
        )
        found.append(finder.results)
    assert found[0]["lr"] == found[1]["lr"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"])


def test_fitting_again() -> None:
    """The same module with a new Trainer, then with the same Trainer for some more epochs."""
    for continued in (False, True):
        trainers = []
        for model in twins(plateau):
            loader, val = data(8 * BATCHES), data(16, seed=1)
            done = fit(model, loader=loader, val=val)
            if continued:
                done.fit_loop.max_epochs = 3
            else:
                done = trainer()
            done.fit(model, loader, val)
            trainers.append(done)
        assert_equal_runs(*trainers)


def test_validate_and_test_alone() -> None:
    ours, plain = twins()
    for verb in ("validate", "test"):
        results = [
            getattr(trainer([CAGrad(), TaskSAM()] if model is ours else []), verb)(
                model, data(16, seed=1), verbose=False
            )
            for model in (ours, plain)
        ]
        assert results[0][0].keys() == results[1][0].keys()
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)


def test_validation_in_training_is_that_of_validate() -> None:
    ours = module()
    done = fit(ours, [CAGrad(), TaskSAM()], val=data(16, seed=1))
    alone = trainer().validate(ours, data(16, seed=1), verbose=False)[0]
    for name, value in alone.items():
        assert done.callback_metrics[name].item() == pytest.approx(value, rel=1e-12)


class Whole(MultiTaskModule):
    """The same net written as a model that does not split."""

    def losses(self, batch, batch_idx):
        return super().losses(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "callbacks", "passes"),
    [
        (MultiTaskModule, [], 1),
        (MultiTaskModule, [CAGrad()], 1),
        (MultiTaskModule, [TaskSAM(rho=0.0)], 1),
        (MultiTaskModule, [CAGrad(), TaskSAM(rho=0.0, adaptive=True, point="joint")], 1),
        (MultiTaskModule, [TaskSAM()], 1 + 2),
        (MultiTaskModule, [CAGrad(), TaskSAM(rho=1.0, adaptive=True)], 1 + 2),
        (MultiTaskModule, [TaskSAM(point="joint")], 1 + 2),
        (MultiTaskModule, [TaskSAM(aggregate="direct")], 1 + 2),
        (MultiTaskModule, [TaskSAM(rho_shared=0.0)], 1),  # the heads read the clean features
        (MultiTaskModule, [TaskSAM(rho_heads=0.0)], 1 + 2),
        (Whole, [TaskSAM()], 1 + 2 * 2),
        (Whole, [TaskSAM(point="joint")], 1 + 2),
    ],
)
def test_how_often_the_trunk_runs(kind: type, callbacks: list, passes: int) -> None:
    ours = module(kind=kind)
    calls = Calls(ours.encoder)
    fit(ours, callbacks)
    assert calls.count == 3 * passes


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_rho_zero_is_the_method_without_it(point: str) -> None:
    first, second = module(), module()
    fit(first, [CAGrad(0.4), TaskSAM(0.0, point=point)])
    fit(second, [CAGrad(0.4)])
    assert_close(first, second, 1e-15)
