"""A module that a callback runs once more, only to look: nothing of it stays."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import GradientConflict
from lightning_flatmtl.hosting.untraced import (
    looking_at,
    perturbed,
    refuse_unfit_to_look_at,
    untraced,
)
from lightning_flatmtl.takeover import second_pass
from tests.helpers import assert_identical, data, fit
from tests.hosts import HOSTS, Foreign, foreign, module

METHODS = {"none": list, "F-CAGrad": lambda: [TaskSAM(), CAGrad()]}


def trunk() -> nn.Sequential:
    """Layers that draw, and layers that keep statistics."""
    torch.manual_seed(4)
    convolution = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
    return nn.Sequential(
        convolution, nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Dropout(0.3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


class Busy:
    """Losses that count, draw, log, measure and change their batch."""

    def begin(self) -> None:
        self.runs = 0
        self.seen: list[float] = []
        self.mean = MeanMetric()
        self.double()

    def busily(self, batch: Any) -> None:
        self.runs += 1
        self.seen.append(float(batch[0].sum()))
        batch[1].pop("spare", None)
        batch[0].add_(random.random() + np.random.rand())
        if not (self.trainer.training or second_pass(self)):
            return
        self.mean(batch[0].mean())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"runs": float(self.runs)}, on_epoch=True, reduce_fx="sum")


class BusyModule(Busy, MultiTaskModule):
    def losses(self, batch: Any, batch_idx: int) -> Any:
        self.busily(batch)
        return super().losses(batch, batch_idx)


class BusyForeign(Busy, Foreign):
    def losses(self, batch: Any) -> Any:
        self.busily(batch)
        return super().losses(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for task, loss in super().losses(batch).items():
            self.log(f"val/{task}/loss", loss)


def busy(host: str) -> Any:
    kind = {"module": BusyModule, "taken over": BusyForeign}[host]
    net = HOSTS[host](kind=kind, trunk=trunk())
    net.begin()
    return net


class Looks(pl.Callback):
    """Runs every batch several times more."""

    def __init__(self) -> None:
        self.losses: list[list[dict[str, float]]] = []
        self.counts: list[dict[str, float]] = []

    def look(self, net: Any, batch: Any, batch_idx: int, evaluate: bool) -> None:
        with looking_at(net, batch, batch_idx, evaluate=evaluate) as look:
            assert second_pass(net)
            found = [look.losses(), {task: look.again(task) for task in "ba"}, look.losses()]
            params = [p for p in net.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(found[1]["a"], params, allow_unused=True)
            pairs = zip(params, gradients, strict=True)
            steps = [torch.zeros_like(p) if g is None else g for p, g in pairs]
            with perturbed(params, steps, 0.5):
                found += [look.losses(), {task: look.again(task) for task in "ab"}]
        assert not second_pass(net)
        self.losses.append([{k: v.item() for k, v in losses.items()} for losses in found])
        self.counts.append(look.counts)

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        self.look(net, batch, batch_idx, evaluate=batch_idx == 1)

    def on_train_batch_end(self, trainer, net, outputs, batch, batch_idx):
        self.look(net, batch, batch_idx, evaluate=False)

    def on_validation_batch_end(self, trainer, net, outputs, batch, batch_idx, dataloader_idx=0):
        self.look(net, batch, batch_idx, evaluate=True)


class Losses(pl.Callback):
    """The losses of the steps themselves."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.drawn: list[Any] = []

    def on_train_batch_end(self, trainer, net, outputs, batch, batch_idx):
        self.found.append({k: v.item() for k, v in outputs["losses"].items()})

    def on_fit_end(self, trainer, net):
        self.drawn = [torch.rand(1).item(), random.random(), np.random.rand()]


def seed() -> None:
    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)


def train(host: str, method: str, looks: list[pl.Callback]) -> tuple[Any, Any, Losses]:
    net, losses = busy(host), Losses()
    seed()
    callbacks = [*looks, losses, *METHODS[method]()]
    made = fit(net, callbacks, data(n=20), data(seed=1), max_epochs=2)
    return net, made, losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_nothing_stays(host, method) -> None:
    looks = Looks()
    net, made, losses = train(host, method, [looks])
    other, expected, steps = train(host, method, [])
    assert_identical(net, other)
    assert net.runs == other.runs
    assert net.seen == other.seen
    assert losses.found == steps.found
    assert losses.drawn == steps.drawn
    assert {k: v.item() for k, v in made.callback_metrics.items()} == {
        k: v.item() for k, v in expected.callback_metrics.items()
    }
    assert len(looks.losses) == 2 + 2 * (2 * 3 + 3)  # the validation before the fit looked, too


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_run_of_a_batch_gives_the_same(host, method) -> None:
    looks = Looks()
    _, _, steps = train(host, method, [looks])
    for one, two, three, four, five in looks.losses:
        assert one == two == three
        assert four == five != one
    before = [look[0] for look in looks.losses[2:8:2]]
    assert before[0] == steps.found[0]  # with the step's own masks
    assert before[1] != steps.found[1]  # in evaluation mode
    assert before[2] == steps.found[2]


def test_what_is_looked_at_knows_how_many_samples_it_has() -> None:
    class Partial(MultiTaskModule):
        def task_loss(self, task: Any, features: Any, batch: Any) -> Tensor | None:
            return None if task == "b" and len(batch[0]) == 4 else super().task_loss(
                task, features, batch
            )  # fmt: skip

    looks = Looks()
    looks.look = lambda net, batch, i, evaluate: looks.counts.append(counts(net, batch, i))
    net = module(kind=Partial)
    net.tasks[0].missing = -100
    loader = data(n=20)
    loader.dataset.targets["a"][:3] = -100
    fit(net, [looks], loader)
    assert looks.counts == 2 * [{"a": 5, "b": 8}] + 2 * [{"a": 8, "b": 8}] + 2 * [{"a": 4}]


def counts(net: Any, batch: Any, batch_idx: int) -> dict[str, float]:
    with looking_at(net, batch, batch_idx) as look:
        look.losses()
    return look.counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_all_comes_back_after_an_error(host, method) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer, net, batch, batch_idx):
            before = {k: v.clone() for k, v in net.state_dict().items()}
            drawn, x = torch.get_rng_state(), batch[0].clone()
            params = list(net.parameters())
            try:
                with untraced(net, evaluate=True), looking_at(net, batch, 0) as look:
                    look.losses()
                    with perturbed(params, [torch.ones_like(p) for p in params]):
                        raise RuntimeError("too far")
            finally:
                assert net.training
                assert all(part.training for part in net.modules())
                assert torch.equal(torch.get_rng_state(), drawn)
                assert torch.equal(batch[0], x)
                assert net.runs == 0
                assert "training_step" not in vars(net) or method == "F-CAGrad"
                assert not second_pass(net)
                for name, value in net.state_dict().items():
                    assert torch.equal(value, before[name]), name

    with pytest.raises(RuntimeError, match="too far") as said:
        fit(busy(host), [Breaks(), *METHODS[method]()])
    assert "only looks" in said.value.__notes__[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_perturbed_parameters_come_back_bit_for_bit(dtype) -> None:
    g = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.randn(3, 4, generator=g).to(dtype)), nn.Parameter(torch.ones(5))]
    before = [p.detach().clone() for p in params]
    steps = [torch.full_like(p, 1e-3) for p in params]
    try:
        with perturbed(params, steps, -3.0):
            for p, was, step in zip(params, before, steps, strict=True):
                torch.testing.assert_close(p.detach(), was - 3 * step)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))


class Total(Metric):
    """Adds up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total.add_(value)

    def compute(self) -> Tensor:
        return self.total


def test_a_metric_that_was_reset_in_inference_mode_may_be_fed() -> None:
    class Measures(Foreign):
        def losses(self, batch: Any) -> Any:
            found = super().losses(batch)
            self.mean.update(found["a"].detach())
            return found

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.mean.reset()

    looks, net = Looks(), foreign(kind=Measures)
    net.mean = Total()
    fit(net, [looks], val=data(seed=1))
    assert len(looks.losses) == 2 + 2 * 3 + 3
    assert not net.mean.update_called
    assert net.mean.total == 0


def test_a_conflict_is_looked_at_in_the_step_only(tmp_path) -> None:
    files = [tmp_path / "with.csv", tmp_path / "without.csv"]
    for file, looks in zip(files, ([Looks()], []), strict=True):
        net = busy("taken over")
        seed()
        fit(net, [GradientConflict(every_n_steps=1, csv=file), *looks])
    assert files[0].read_text("utf-8") == files[1].read_text("utf-8")


def test_a_step_that_takes_the_batch_alone_is_looked_at() -> None:
    class Alone(Foreign):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)

    looks = Looks()
    fit(foreign(kind=Alone), [looks])
    assert len(looks.losses) == 6


def test_what_cannot_be_looked_at_is_refused() -> None:
    class Fetches(Foreign):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    refuse_unfit_to_look_at(module(), "Monitor")
    refuse_unfit_to_look_at(foreign(), "Monitor")
    with pytest.raises(MisconfigurationException, match="Monitor expects `training_step"):
        refuse_unfit_to_look_at(foreign(kind=Fetches), "Monitor")
    net = foreign()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Monitor expects a MultiTaskModule or"):
        refuse_unfit_to_look_at(net, "Monitor")
