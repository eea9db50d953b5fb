"""An ordinary LightningModule with our callbacks trains as a MultiTaskModule does."""

import copy
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import (
    DBMTL,
    FAMO,
    CAGrad,
    DynamicWeightAverage,
    GradNorm,
    GradVac,
    LinearScalarization,
    NashMTL,
    PCGrad,
    RandomLossWeighting,
    UncertaintyWeighting,
)
from lightning_flatmtl.engine.passes.rng_replay import RNGReplay
from lightning_flatmtl.takeover import TakeOver, host_of, second_pass
from tests import naive
from tests.helpers import assert_close, assert_identical, data, fit, module, sgd, trainer
from tests.hosts import HOSTS, Foreign, Steps, flat_share, foreign, single, smooth_trunk, values
from tests.test_bad_input import says
from tests.test_exact import naive_fit
from tests.test_no_leak import MovingNorm

# The same parameters from both hosts.

AGGREGATORS: dict[str, Callable[[], pl.Callback]] = {
    "CAGrad": CAGrad,
    "PCGrad": PCGrad,
    "NashMTL": lambda: NashMTL(normalize=True),
    "LS": LinearScalarization,
    "RLW": RandomLossWeighting,
    "GradNorm": lambda: GradNorm(lr=0.1),
    "UW": lambda: UncertaintyWeighting(lr=0.1),
    "FAMO": lambda: FAMO(lr=0.1),
    "DWA": DynamicWeightAverage,
    "GradVac": lambda: GradVac(beta=0.5),
    "DBMTL": lambda: DBMTL(beta=0.5),
}
SAMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "separate": {"rho": 0.05},
    "joint": {"rho": 0.05, "point": "joint"},
    "adaptive": {"rho": 0.5, "adaptive": True},
    "adaptive joint": {"rho": 0.5, "adaptive": True, "point": "joint"},
    "direct": {"rho": 0.05, "aggregate": "direct"},
    "second": {"rho": 0.05, "aggregate": "second"},
    "each": {"rho": 0.5, "adaptive": True, "aggregate": "each"},
    "shared only": {"rho": 0.05, "rho_heads": 0.0},
    "heads only": {"rho": 0.05, "rho_shared": 0.0},
}


def method(aggregator: str | None, sam: str) -> list[pl.Callback]:
    settings = SAMS[sam]
    found = [] if settings is None else [TaskSAM(**settings)]
    return found if aggregator is None else [AGGREGATORS[aggregator](), *found]


@pytest.mark.parametrize(
    ("aggregator", "sam"),
    [
        *((name, sam) for name in ("CAGrad", "PCGrad", "NashMTL") for sam in SAMS),
        *((name, sam) for name in list(AGGREGATORS)[3:] for sam in ("plain", "separate", "direct")),
        *((None, sam) for sam in ("separate", "joint")),
    ],
)
def test_both_hosts_train_alike(aggregator: str | None, sam: str) -> None:
    ours, taken = module(), foreign()
    start = values(taken)
    for model in (ours, taken):
        done = fit(model, method(aggregator, sam), data(16), max_epochs=3)
        assert done.global_step == 6
    assert_close(taken, ours, 1e-10)
    assert (values(taken) - start).norm() > 0.01 * start.norm()
    for (name, buffer), other in zip(taken.named_buffers(), ours.buffers(), strict=True):
        assert torch.allclose(buffer, other, rtol=1e-10), name


@pytest.mark.parametrize(
    ("name", "direction"), [("CAGrad", naive.cagrad(0.5)), ("PCGrad", naive.pcgrad)]
)
@pytest.mark.parametrize("sam", ["plain", "separate", "adaptive joint", "direct", "second", "each"])
def test_against_the_naive_loop(name: str, direction: Any, sam: str) -> None:
    taken, reference = foreign(), module()
    callbacks = method(name, sam)
    if name == "CAGrad":
        callbacks[0] = CAGrad(0.5)
    fit(taken, callbacks)
    settings = {**(SAMS[sam] or {})}
    settings["arm"] = settings.pop("aggregate", "split")
    naive_fit(reference, direction, **settings)
    assert_close(taken, reference, 1e-10)


@pytest.mark.parametrize("aggregator", ["CAGrad", "GradNorm", "FAMO", None])
def test_accumulation_and_clipping_are_the_trainers(aggregator: str | None) -> None:
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    ours, taken = module(**settings), foreign()
    fit(ours, method(aggregator, "separate"), data(40), max_epochs=2)
    done = fit(taken, method(aggregator, "separate"), data(40), max_epochs=2, **settings)
    assert done.global_step == 6
    assert_close(taken, ours, 1e-10)


def test_a_radius_of_zero_is_plain_lightning() -> None:
    taken, plain = foreign(), foreign()
    fit(taken, [LinearScalarization(), TaskSAM(0.0)], max_epochs=2)
    fit(plain, [], max_epochs=2)
    assert_close(taken, plain, 1e-12)


def test_what_is_declared_is_not_looked_for() -> None:
    class Declares(Foreign):
        """The first layer of the head of "a" is said to be shared."""

        def shared_parameters(self):
            return [*self.encoder.parameters(), *self.heads["a"][0].parameters()]

        def task_parameters(self, task):
            return self.heads["a"][2].parameters() if task == "a" else None

    class OurDeclares(MultiTaskModule):
        shared_parameters = Declares.shared_parameters
        task_parameters = Declares.task_parameters

    ours, taken, other = module(kind=OurDeclares), foreign(Declares), foreign()
    for model in (ours, taken, other):
        fit(model, [CAGrad(), TaskSAM(0.05)])
    assert_close(taken, ours, 1e-10)
    assert (values(taken) - values(other)).norm() > 1e-3


# Random masks repeat in the second pass.

RADII = [10.0**-k for k in range(1, 7)]


def shares(host: str, point: str = "separate") -> list[float]:
    """How large the flat part is, by radius, with dropout 0.5 in the trunk."""
    found = []
    for rho in RADII:
        model = HOSTS[host](trunk=smooth_trunk(0.5))
        torch.manual_seed(0)
        steps = Steps()
        fit(model, [CAGrad(), TaskSAM(rho, point=point), steps], data(8))
        found.append(flat_share(steps.results[0]))
    return found


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_the_flat_part_goes_with_the_radius(host: str, point: str) -> None:
    found = shares(host, point)
    assert found[0] < 1
    # In proportion to the radius, which needs the same mask in both passes.
    for rho, share in zip(RADII[1:], found[1:], strict=True):
        assert share == pytest.approx(found[-1] / RADII[-1] * rho, rel=0.3)


@pytest.mark.parametrize("host", HOSTS)
def test_without_replay_it_does_not(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RNGReplay, "rewind", lambda *_: None)
    assert min(shares(host)) > 0.3


# 16 bits, with a scaler of the loss.


def half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def scale_of(done: pl.Trainer) -> float:
    scaler = done.precision_plugin.scaler
    return scaler.get_scale()


def single_host(host: str, **kwargs: Any) -> Any:
    return HOSTS[host](trunk=smooth_trunk(), **kwargs).float()


class Distances:
    """How far the parameters are from where the clean pass was, in each second pass."""

    def __init__(self, model: pl.LightningModule) -> None:
        self.model = model
        self.found: list[float] = []
        model.encoder.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        if second_pass(self.model):
            self.found.append(float((values(self.model) - self.start).norm()))
        else:
            self.start = values(self.model)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_the_radius_is_that_of_32_bits(host: str, point: str) -> None:
    rho = 0.05
    expected = rho if point == "separate" else rho * 2**0.5
    for settings in ({}, half()):
        model = single_host(host)
        distances = Distances(model)
        fit(model, [CAGrad(), TaskSAM(rho, point=point)], single(data()), **settings)
        passes = 4 if (host, point) == ("taken over", "separate") else 2
        assert len(distances.found) == 3 * passes
        assert distances.found == pytest.approx([expected] * len(distances.found), rel=1e-3)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("aggregator", ["CAGrad", "UW", "GradNorm", None])
def test_16_bits_train_as_32_bits_do(host: str, aggregator: str | None) -> None:
    trained = []
    for settings in ({}, half()):
        model = single_host(host)
        start = values(model)
        fit(model, method(aggregator, "separate"), single(data()), **settings)
        trained.append(values(model) - start)
    assert (trained[1] - trained[0]).norm() < 0.02 * trained[0].norm()


class Spoils:
    """Mixed into a host: spoils the loss of "b" in one place."""

    at, second, factor = 1, False, math.inf

    def spoil(self, losses: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        hit = self.at in ("always", batch_idx) and second_pass(self) == self.second
        return {**losses, "b": losses["b"] * self.factor} if hit else losses


class ForeignSpoils(Spoils, Foreign):
    def training_step(self, batch, batch_idx):
        losses = self.spoil(self.losses(batch), batch_idx)
        return {"loss": sum(losses.values()), "losses": losses}


class OurSpoils(Spoils, MultiTaskModule):
    batch_idx = -1

    def on_train_batch_start(self, batch, batch_idx):
        self.batch_idx = batch_idx

    def task_loss(self, task, features, batch):
        loss = super().task_loss(task, features, batch)
        return self.spoil({"b": loss}, self.batch_idx)["b"] if task == "b" else loss


def spoils(host: str, at: Any, second: bool, factor: float) -> Any:
    model = single_host(host, kind=OurSpoils if host == "module" else ForeignSpoils)
    model.at, model.second, model.factor = at, second, factor
    return model


class Watches(pl.Callback):
    """What a skipped step must leave alone, before and after every batch."""

    def __init__(self, aggregator: Any) -> None:
        self.aggregator = aggregator
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.scales: list[float] = []

    def _all(self, trainer, pl_module) -> Any:
        state = trainer.optimizers[0].state_dict()["state"]
        learned = self.aggregator.state_dict() if self.aggregator else {}
        learned.pop("steps", None)  # FAMO counts skipped steps too, as Lightning does
        return copy.deepcopy((values(pl_module), state, learned))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(self._all(trainer, pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(self._all(trainer, pl_module))
        self.scales.append(scale_of(trainer))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


SCALED = ["CAGrad", "GradNorm", "UW", "DWA", "GradVac", "PCGrad", "DBMTL", "FAMO"]


def spoilt_batch(host: str, aggregator: str | None, sam: str, second: bool, factor: float) -> None:
    """Batch 1 of 5 overflows: nothing moves but the scale, and the others train as without it."""
    model = spoils(host, 1, second, factor)
    callbacks = method(aggregator, sam)
    watches = Watches(callbacks[0] if aggregator else None)
    done = fit(model, [*callbacks, watches], single(data(40)), **half())
    assert same(watches.before[1], watches.after[1])
    assert not any(torch.equal(watches.before[i][0], watches.after[i][0]) for i in (0, 2, 3, 4))
    assert watches.scales == [2.0**16] + [2.0**15] * 4
    assert done.global_step == 5
    assert all(p.isfinite().all() for p in model.parameters())

    reference = single_host(host)
    loader = single(data(40))
    rest = [i for i in range(40) if i // 8 != 1]
    loader.dataset.inputs = loader.dataset.inputs[rest]
    loader.dataset.targets = {k: v[rest] for k, v in loader.dataset.targets.items()}
    again = method(aggregator, sam)
    fit(reference, again, loader, **half())
    # The other scale rounds half-precision gradients differently where they are tiny.
    assert (values(model) - values(reference)).norm() < 1e-4 * values(reference).norm()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("aggregator", "factor"),
    [
        *((name, math.inf) for name in SCALED),
        # Finite, but not when it is scaled; FAMO divides by the loss and does not mind.
        *((name, 1e36) for name in SCALED if name != "FAMO"),
    ],
)
def test_an_overflow_in_the_clean_pass(host: str, aggregator: str | None, factor: float) -> None:
    spoilt_batch(host, aggregator, "plain", second=False, factor=factor)


@pytest.mark.parametrize("factor", [math.inf, 1e36])
def test_an_overflow_without_a_method(factor: float) -> None:
    """Plain Lightning skips the step, and so does a module that is trained on the plain sum."""
    spoilt_batch("module", None, "plain", second=False, factor=factor)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("aggregator", ["CAGrad", "GradNorm", "DWA", None])
def test_an_overflow_before_a_second_pass(host: str, aggregator: str) -> None:
    spoilt_batch(host, aggregator, "separate", second=False, factor=math.inf)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("aggregator", "sam"), [*((name, "separate") for name in SCALED), (None, "joint")]
)
def test_an_overflow_in_the_second_pass(host: str, aggregator: str | None, sam: str) -> None:
    spoilt_batch(host, aggregator, sam, second=True, factor=math.inf)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("aggregator", ["GradNorm", "UW", "DBMTL", "PCGrad"])
def test_an_overflow_in_an_accumulated_group(host: str, aggregator: str) -> None:
    """Batches 2 and 3 make one step; neither counts."""
    model = spoils(host, 3, False, math.inf)
    callbacks = method(aggregator, "separate")
    watches = Watches(callbacks[0])
    if host == "module":
        model._manual.accumulate_grad_batches, settings = 2, {}
    else:
        settings = {"accumulate_grad_batches": 2}
    fit(model, [*callbacks, watches], single(data(48)), **half(), **settings)
    assert same(watches.before[2], watches.after[3])
    assert not torch.equal(watches.after[3][0], watches.after[5][0])
    assert watches.scales == [2.0**16] * 3 + [2.0**15] * 3


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("second", [False, True])
def test_overflows_without_end_are_told_of(host: str, second: bool) -> None:
    model = spoils(host, "always", second, math.nan)
    start = values(model)
    loader = single(data(8 * 30))
    with pytest.warns(RuntimeWarning, match="25 steps in a row .* task 'b' was not finite") as told:
        fit(model, [CAGrad(), TaskSAM(0.05)], loader, **half())
    assert [w.category for w in told].count(RuntimeWarning) == 1
    assert torch.equal(values(model), start)
    fit(model, [CAGrad(), TaskSAM(0.05)], single(data(8 * 24)), **half())  # one less is no matter


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("aggregator", ["UW", "LS"])
def test_overflows_are_told_of_where_no_gradient_is_looked_at(host: str, aggregator: str) -> None:
    with pytest.warns(RuntimeWarning, match="25 steps in a row .* task 'b' was not finite"):
        fit(
            spoils(host, "always", False, math.nan),
            method(aggregator, "plain"),
            single(data(8 * 30)),
            **half(),
        )


# Resuming in the middle of an epoch.


class Resumable:
    """A loader of shuffled batches that knows where it is."""

    def __init__(self, n: int = 40, batch_size: int = 8) -> None:
        self.dataset = data(n).dataset
        self.batch_size = batch_size
        self.epoch = self.at = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(
            len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)
        ).split(self.batch_size)
        while self.at < len(self):
            picked = order[self.at]
            self.at += 1
            targets = {k: v[picked] for k, v in self.dataset.targets.items()}
            yield self.dataset.inputs[picked], targets
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


def decaying(self) -> Any:
    optimizer = sgd(self.parameters())
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


RESUMED = ["CAGrad", "PCGrad", "RLW", "GradVac", "GradNorm", "UW", "DWA", "DBMTL", "FAMO"]


def resumable(host: str, accumulate: int, scheduler: bool = False) -> tuple[Any, dict[str, Any]]:
    body = {"configure_optimizers": decaying} if scheduler else {}
    if host == "module":
        kind = type("Ours", (MultiTaskModule,), body)
        return module(kind=kind, accumulate_grad_batches=accumulate), {}
    return foreign(type("Theirs", (Foreign,), body)), {"accumulate_grad_batches": accumulate}


def break_and_resume(
    tmp_path: Path, host: str, callbacks: Callable[[], list[Any]], accumulate: int, **kwargs: Any
) -> None:
    unbroken, settings = resumable(host, accumulate, **kwargs)
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    settings = {**settings, "max_epochs": 3}
    whole = fit(
        unbroken, [*callbacks(), checkpoints], Resumable(), enable_checkpointing=True, **settings
    )
    # In the middle of the first and of the second epoch.
    for step in (2, 7) if accumulate == 1 else (1, 5):
        resumed, _ = resumable(host, accumulate, **kwargs)
        path = tmp_path / f"step={step}.ckpt"
        done = fit(resumed, callbacks(), Resumable(), ckpt_path=path, **settings)
        assert done.global_step == whole.global_step
        assert_identical(resumed, unbroken)


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@resuming
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("aggregator", RESUMED)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_mid_epoch_is_going_on(
    tmp_path: Path, host: str, aggregator: str, accumulate: int
) -> None:
    break_and_resume(tmp_path, host, lambda: method(aggregator, "separate"), accumulate)


@resuming
@pytest.mark.parametrize("host", HOSTS)
def test_a_scheduler_of_epochs_goes_on_in_mid_epoch(tmp_path: Path, host: str) -> None:
    break_and_resume(tmp_path, host, lambda: method("CAGrad", "separate"), 1, scheduler=True)


@resuming
@pytest.mark.parametrize("host", HOSTS)
def test_what_is_shared_is_known_after_resuming(tmp_path: Path, host: str) -> None:
    """The first batches after the checkpoint lack "b", which has shown what is shared."""

    def some(losses: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return losses if batch_idx % 4 == 0 else {"a": losses["a"]}

    class Ours(MultiTaskModule):
        def losses(self, batch, batch_idx):
            return some(super().losses(batch, batch_idx), batch_idx)

    class Theirs(Foreign):
        def training_step(self, batch, batch_idx):
            return {"losses": some(self.losses(batch), batch_idx)}

    def start() -> Any:
        return module(kind=Ours) if host == "module" else foreign(Theirs)

    unbroken, resumed = start(), start()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    settings = {"max_epochs": 2, "loader": Resumable()}
    fit(unbroken, [*method("CAGrad", "joint"), checkpoints], enable_checkpointing=True, **settings)
    settings["loader"] = Resumable()
    fit(resumed, method("CAGrad", "joint"), ckpt_path=tmp_path / "step=2.ckpt", **settings)
    assert_identical(resumed, unbroken)


# Nothing of the second pass stays behind.


class Noise(nn.Module):
    """Draws from all random streams of the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(()))


def busy_trunk() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        MovingNorm(4),
        Noise(),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, momentum=None),
    )


class Busy(Foreign):
    """Logs, counts and draws in ``training_step``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total = torchmetrics.SumMetric()
        self.seen = torchmetrics.CatMetric()
        self.pair = torchmetrics.MetricCollection(
            {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
        )

    flags: ClassVar[list[bool]] = []  # of the class: what lies in the module is put back

    def training_step(self, batch, batch_idx):
        self.flags.append(second_pass(self))
        outputs = super().training_step(batch, batch_idx)
        losses = outputs["losses"]
        self.log("train/loss", outputs["loss"], prog_bar=True)
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({f"train/{t}": v for t, v in losses.items()}, on_step=True, on_epoch=True)
        self.total(torch.ones(()))
        self.log("by metric", self.total, on_step=False, on_epoch=True)
        self.seen.update(torch.tensor([float(batch_idx)]))
        self.pair.update(losses["a"].detach()[None], losses["b"].detach()[None])
        return outputs


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def streams() -> Any:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize(
    ("aggregator", "sam"),
    [
        *((name, sam) for name in (None, "CAGrad") for sam in SAMS if sam != "plain"),
        *(("FAMO", sam) for sam in SAMS if sam not in ("plain", "second", "each")),
    ],
)
def test_what_the_module_sees_of_the_second_pass(aggregator: str | None, sam: str) -> None:
    """Logs, metrics, buffers and random streams are those of a plain run at the same place."""
    runs = []
    for callbacks in ([], method(aggregator, sam)):
        taken = foreign(Busy, busy_trunk(), optimizer=still)
        Busy.flags = []
        seed()
        done = fit(taken, callbacks, max_epochs=2)
        logged = {k: v.item() for k, v in done.callback_metrics.items()}
        runs.append((taken, logged, streams(), Busy.flags))
    (plain, logged, drawn, plain_flags), (taken, ours, ours_drawn, flags) = runs
    assert ours == logged
    assert logged["count"] == logged["by metric"] == 3.0
    assert drawn == ours_drawn
    assert_identical(taken, plain)
    assert taken.encoder[3].count == 2 * 3
    assert taken.seen.compute().tolist() == plain.seen.compute().tolist() == [0, 1, 2] * 2
    assert taken.pair.compute() == plain.pair.compute()
    assert [m.update_count for m in taken.pair.values()] == [6, 6]
    again = dict.fromkeys(("separate", "adaptive", "direct", "second", "each"), 4).get(sam, 2)
    # FAMO's look at the losses after the step is as mute as a second pass.
    step = [False] + [True] * (again + (aggregator == "FAMO"))
    assert flags == step * 6
    assert plain_flags == [False] * 6


class Stop(BaseException):
    """As an interrupt, caught by nobody on the way."""


class StopsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Stop


class Breaks(Busy):
    """Raises in a second pass of the second batch."""

    error: type[BaseException] | None = Stop
    place = "forward"

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        if second_pass(self) and batch_idx == 1 and self.error is not None:
            type(self).in_pass = values(self)
            if self.place == "forward":
                raise self.error
            outputs["losses"]["b"] = StopsInBackward.apply(outputs["losses"]["b"])
        return outputs


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (Stop, "forward"),
        (Stop, "backward"),
        (RuntimeError, "forward"),
        (KeyboardInterrupt, "forward"),
    ],
)
@pytest.mark.parametrize("sam", ["separate", "joint", "adaptive", "heads only"])
def test_after_an_exception(error: type[BaseException], place: str, sam: str) -> None:
    taken = foreign(Breaks, busy_trunk(), optimizer=still)
    taken.error, taken.place = error, place
    start = values(taken)
    # Lightning turns the interrupt of a user into an exit.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(taken, method("CAGrad", sam))
    assert (taken.in_pass - start).norm() > 0.04
    assert torch.equal(values(taken), start)
    assert "training_step" not in vars(taken)
    assert "log" not in vars(taken)
    assert not second_pass(taken)
    assert host_of(taken) is taken
    assert taken.total.compute() == 2.0
    assert taken.encoder[3].count == 2
    assert all(
        layer.track_running_stats
        for layer in taken.encoder
        if hasattr(layer, "track_running_stats")
    )
    taken.error = None
    fit(taken, method("CAGrad", sam))
    assert taken.encoder[3].count == 5


class Copies(pl.Callback):
    """Copies the module in mid-fit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.held = vars(pl_module)["training_step"]
        self.copied = copy.deepcopy(pl_module)
        self.values = values(pl_module)


def test_a_deep_copy_in_mid_fit_is_a_plain_module() -> None:
    taken, copies = foreign(), Copies()
    fit(taken, [CAGrad(), TaskSAM(0.05), copies])
    twin = copies.copied
    assert isinstance(copies.held, TakeOver)
    assert not isinstance(vars(twin).get("training_step"), TakeOver)
    assert twin.training_step.__self__ is twin
    assert torch.equal(values(twin), copies.values)
    fit(twin)
    fit(taken)
    assert_identical(twin, taken)


def test_a_pickle_in_mid_fit_is_a_plain_module() -> None:
    class Pickles(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held = pl_module._trainer, pl_module._fabric
            pl_module._trainer = None  # holds callbacks of this function
            self.dumped = pickle.dumps(pl_module)
            pl_module._trainer = held[0]

    taken, pickles = foreign(), Pickles()
    fit(taken, [CAGrad(), TaskSAM(0.05), pickles])
    twin = pickle.loads(pickles.dumped)
    assert not isinstance(vars(twin).get("training_step"), TakeOver)
    assert twin.training_step.__self__ is twin
    assert_identical(twin, taken)
    fit(twin)
    fit(taken)
    assert_identical(twin, taken)


@pytest.mark.parametrize("aggregator", ["CAGrad", "PCGrad"])
def test_fitting_twice(aggregator: str) -> None:
    ours, taken = module(), foreign()
    for model in (ours, taken):
        for _ in range(2):
            fit(model, method(aggregator, "separate"))
            fit(model)  # and as an ordinary module in between
    assert_close(taken, ours, 1e-10)
    assert "training_step" not in vars(taken)


def test_one_trainer_fits_twice() -> None:
    ours, taken = module(), foreign()
    for model in (ours, taken):
        made = trainer([CAGrad(), TaskSAM(0.05)])
        made.fit(model, data())
        made.fit_loop.max_epochs = 2
        made.fit(model, data())
        assert made.global_step == 6
    assert_close(taken, ours, 1e-10)


def test_one_callback_serves_two_modules() -> None:
    first, second = foreign(), foreign()
    sam, aggregator = TaskSAM(0.05), CAGrad()
    for model in (first, second):
        fit(model, [aggregator, sam])
    assert_identical(first, second)


def test_a_training_step_of_the_instance() -> None:
    taken, reference = foreign(), foreign()
    calls = []

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return type(taken).training_step(taken, batch, batch_idx)

    taken.training_step = own
    fit(taken, [CAGrad(), TaskSAM(0.05)])
    assert vars(taken)["training_step"] is own
    assert calls == [i for i in range(3) for _ in range(5)]
    fit(reference, [CAGrad(), TaskSAM(0.05)])
    assert_close(taken, reference, 1e-14)


def test_signatures() -> None:
    class BatchOnly(Foreign):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Decorated(Foreign):
        @torch.enable_grad()
        def training_step(self, batch, batch_idx):
            assert isinstance(batch_idx, int)
            return super().training_step(batch, batch_idx)

    reference = foreign()
    fit(reference, [CAGrad(), TaskSAM(0.05)])
    for kind in (BatchOnly, Decorated):
        taken = foreign(kind)
        fit(taken, [CAGrad(), TaskSAM(0.05)])
        assert_identical(taken, reference)


def test_other_outputs_pass_without_their_graphs() -> None:
    class Extra(Foreign):
        def training_step(self, batch, batch_idx):
            features = self.encoder(batch[0])
            losses = super().training_step(batch, batch_idx)["losses"]
            parts = [features, {"name": "x", "square": features**2}]
            return {"loss": sum(losses.values()), "losses": losses, "parts": parts, "index": 7}

    class Takes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.outputs = outputs

    takes = Takes()
    fit(foreign(Extra), [CAGrad(), TaskSAM(0.05), takes])
    outputs = takes.outputs
    assert outputs.keys() == {"loss", "losses", "parts", "index"}
    assert outputs["index"] == 7
    assert outputs["parts"][1]["name"] == "x"
    tensors = [outputs["loss"], *outputs["losses"].values(), outputs["parts"][0]]
    assert not any(t.requires_grad for t in [*tensors, outputs["parts"][1]["square"]])
    assert outputs["loss"].item() == pytest.approx(sum(outputs["losses"].values()).item())


def test_the_logged_total_may_be_missing() -> None:
    class NoTotal(Foreign):
        def training_step(self, batch, batch_idx):
            return {"losses": self.losses(batch)}

    taken, reference = foreign(NoTotal), foreign()
    for model in (taken, reference):
        fit(model, [CAGrad(), TaskSAM(0.05)])
    assert_identical(taken, reference)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_what_does_not_train_is_left_alone(verb: str) -> None:
    class Evaluates(Foreign):
        def forward(self, batch):
            return self.losses(batch)

        def validation_step(self, batch, batch_idx):
            assert "training_step" not in vars(self)

        test_step = validation_step

    getattr(trainer([CAGrad(), TaskSAM()]), verb)(foreign(Evaluates), data())


# Bad input.


def returning(what: Callable[[dict[str, Any]], Any]) -> Any:
    class Returns(Foreign):
        def training_step(self, batch, batch_idx):
            return what(super().training_step(batch, batch_idx))

    return foreign(Returns)


METHODS = [
    lambda: [CAGrad()],
    lambda: [TaskSAM()],
    lambda: [LinearScalarization()],
    lambda: [CAGrad(), TaskSAM()],
]


@pytest.mark.parametrize("make", METHODS)
def test_outputs_of_another_form(make: Callable[[], list[pl.Callback]]) -> None:
    expected = '`training_step` must return {"loss": total, "losses": {"a": loss_a'
    for what, got in (
        (lambda out: out["loss"], "got Tensor"),
        (lambda out: {"loss": out["loss"]}, "a mapping with the keys ['loss']"),
        (lambda out: {**out, "losses": list(out["losses"].values())}, 'got list for "losses"'),
        (lambda out: {**out, "losses": out["loss"]}, 'got Tensor for "losses"'),
    ):
        with says(MisconfigurationException, expected, got):
            fit(returning(what), make())


@pytest.mark.parametrize("make", METHODS)
def test_losses_of_another_form(make: Callable[[], list[pl.Callback]]) -> None:
    def bent(how: Callable[[Tensor], Any]) -> Any:
        return returning(lambda out: {"losses": {**out["losses"], "b": how(out["losses"]["b"])}})

    for how, got in (
        (lambda v: v.repeat(3), "got a tensor of shape [3]"),
        (Tensor.item, "got float"),
    ):
        with says(ValueError, "task 'b' must be a scalar tensor", got):
            fit(bent(how), make())
    with says(ValueError, "task 'b' must depend on a trainable parameter"):
        fit(bent(lambda v: v.detach()), make())
    with says(ValueError, "loss of task 'b' must be finite", "got nan"):
        fit(bent(lambda v: v * math.nan), make())


@pytest.mark.parametrize("make", METHODS)
def test_modules_that_cannot_be_taken_over(make: Callable[[], list[pl.Callback]]) -> None:
    with says(
        MisconfigurationException,
        "automatic optimization or a MultiTaskModule",
        "ManualOptimBoringModel",
        "`automatic_optimization = False`",
        "override `losses`",
    ):
        fit(ManualOptimBoringModel(), make())

    class Fetches(Foreign):
        def training_step(self, dataloader_iter):
            raise AssertionError

    fetches = pytest.warns(UserWarning, match="`dataloader_iter` step flavor")  # Lightning's own
    with fetches, says(MisconfigurationException, "`training_step(self, batch, batch_idx)`"):
        fit(foreign(Fetches), make())
    with says(MisconfigurationException, "must return", "the keys ['loss']"):
        fit(BoringModel(), make(), torch.utils.data.DataLoader(torch.zeros(8, 32)))


@pytest.mark.parametrize("sam", ["plain", "separate"])
def test_a_total_that_is_not_the_sum(sam: str) -> None:
    message = 'the "losses" .*sum to .* only the "losses" and the "penalty" are'
    odd = returning(lambda out: {**out, "loss": 3 * out["loss"]})
    with pytest.warns(UserWarning, match=message) as told:
        fit(odd, method("CAGrad", sam), max_epochs=2)
    assert len([w for w in told if "losses" in str(w.message)]) == 1
    reference = foreign()
    fit(reference, method("CAGrad", sam), max_epochs=2)  # a warning would be an error
    assert_identical(odd, reference)


def test_the_loss_that_lightning_sees_is_the_modules() -> None:
    class Loss(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.value = outputs["loss"].item() / sum(outputs["losses"].values()).item()

    look = Loss()
    with pytest.warns(UserWarning, match="is not trained"):
        fit(returning(lambda out: {**out, "loss": 3 * out["loss"]}), [CAGrad(), look])
    assert look.value == pytest.approx(3.0)


def test_a_checkpoint_that_is_saved_after_the_fit_knows_what_is_shared(tmp_path: Path) -> None:
    taken = foreign()
    done = fit(taken, [CAGrad()])
    done.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)["lightning_flatmtl.partition"]
    assert saved["seen"] == ["a", "b"]
    assert {owner for name, owner in saved["owners"].items() if "encoder" in name} == {None}
