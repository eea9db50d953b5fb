"""What an aggregator has learned: whose it is, when it is forgotten, which tasks it is about."""

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl import aggregators as a
from tests.aggregators.specs import SPECS, Spec
from tests.helpers import Pairs, assert_identical, data, fit, module, trainer
from tests.hosts import HOSTS, Foreign, foreign

STATEFUL = [n for n, spec in SPECS.items() if "stateful" in spec.traits]
STATEFUL_SPECS = pytest.mark.parametrize("spec", [SPECS[n] for n in STATEFUL], ids=STATEFUL)
EACH_HOST = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS.keys())
pytestmark = pytest.mark.filterwarnings("ignore:.*does not scale with the gradients")


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def memoryless(params: Any) -> torch.optim.Optimizer:
    """An optimizer that a new one continues."""
    return torch.optim.SGD(params, lr=0.1)


def other_data() -> DataLoader:
    loader = data(seed=7)
    loader.dataset.inputs *= 3.0
    return loader


# Whose the state is.


@EACH_HOST
@STATEFUL_SPECS
def test_a_fit_of_another_module_starts_afresh(spec: Spec, make: Any) -> None:
    alone, second = make(), make()
    fit(alone, [spec.make(), TaskSAM()])
    used = spec.make()
    fit(make(), [used, TaskSAM()], other_data(), max_epochs=2)
    fit(second, [used, TaskSAM()])
    assert_identical(second, alone)


@EACH_HOST
@STATEFUL_SPECS
def test_another_trainer_starts_afresh(spec: Spec, make: Any) -> None:
    net, used, fresh = make(), spec.make(), spec.make()
    fit(net, [used], max_epochs=2)
    twin = make()
    twin.load_state_dict(net.state_dict())
    fit(net, [used])
    fit(twin, [fresh])
    assert_identical(net, twin)


@EACH_HOST
@STATEFUL_SPECS
def test_a_trainer_that_fits_further_keeps_the_state(spec: Spec, make: Any) -> None:
    unbroken, continued = make(optimizer=memoryless), make(optimizer=memoryless)
    fit(unbroken, [spec.make()], max_epochs=4)
    by = trainer([spec.make()], max_epochs=2)
    by.fit(continued, data())
    by.fit_loop.max_epochs = 4
    by.fit(continued, data())
    assert_identical(continued, unbroken)


@EACH_HOST
def test_a_test_run_between_two_fits_changes_nothing(make: Any, tmp_path: Path) -> None:
    used, net = a.GradNorm(), make()
    net.__class__ = type("Tested", (type(net),), {"test_step": lambda self, batch, batch_idx: None})
    by = fit(net, [used, ModelCheckpoint(tmp_path)], other_data(), enable_checkpointing=True)
    by.test(net, data(), ckpt_path="best", verbose=False, weights_only=True)
    alone, second = make(), make()
    fit(alone, [a.GradNorm()])
    fit(second, [used], max_epochs=1)
    assert_identical(second, alone)


@EACH_HOST
def test_a_fit_that_broke_off_leaves_nothing(make: Any) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("broken off")

    used = a.GradNorm()
    with pytest.raises(RuntimeError, match="broken off"):
        fit(make(), [used, Breaks()], other_data())
    alone, second = make(), make()
    fit(alone, [a.GradNorm()])
    fit(second, [used])
    assert_identical(second, alone)


@EACH_HOST
def test_a_state_that_was_loaded_by_hand_is_used(make: Any) -> None:
    donor = a.GradNorm()
    fit(make(), [donor], other_data())
    given = a.GradNorm()
    given.load_state_dict(donor.state_dict())
    expected = dict(given._first)
    fit(make(), [given])
    assert given._first == expected
    fit(make(), [given])  # it was for one fit
    assert given._first != expected


@STATEFUL_SPECS
def test_reset_is_as_made_anew(spec: Spec) -> None:
    def run(aggregator: a.Aggregator) -> list[Tensor]:
        found = []
        for i in range(4):
            g = torch.Generator().manual_seed(i)
            rows = torch.randn(3, 8, dtype=torch.float64, generator=g)
            for part in ("loss", "flat"):
                found.append(aggregator(rows + i, losses=torch.rand(3, generator=g) + 1, part=part))  # type: ignore[arg-type]
            for close in ("step", "end_epoch"):
                getattr(aggregator, close, lambda: None)()
        return found

    used = spec.make()
    fresh = copy.deepcopy(used.state_dict())
    first = run(used)
    used.reset()
    assert same(used.state_dict(), fresh)
    for got, expected in zip(run(used), first, strict=True):
        assert torch.equal(got, expected)


class Counting(a.LossWeighting):
    """A method of one's own that has a state and nothing to forget it by."""

    def __init__(self) -> None:
        self.steps = 0

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        self.steps += 1
        return torch.ones(len(tasks), dtype=torch.float64)

    def get_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@EACH_HOST
def test_a_state_that_cannot_be_forgotten_is_refused(make: Any) -> None:
    used = Counting()
    fit(make(), [used])
    with pytest.raises(MisconfigurationException, match="Override `reset`, or make a new Counting"):
        fit(make(), [used])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("method", [a.DynamicWeightAverage, a.STCH])
def test_methods_that_count_epochs_close_those_of_the_take_over(method: Any) -> None:
    class Skips(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    by = fit(foreign(Skips), [method()])
    assert by.callback_metrics["train/skipped_batches"] == 1.0


# Which tasks it is about.


class Renaming(Foreign):
    """Calls its tasks other than they are in the data."""

    names: ClassVar = {"a": "a", "b": "b"}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = {self.names[t]: loss for t, loss in self.losses(batch).items()}
        losses = {t: loss for t, loss in losses.items() if t not in self.absent(batch_idx)}
        return {"loss": sum(losses.values()), "losses": losses}

    def absent(self, batch_idx: int) -> set[str]:
        return set()


class Renamed(Renaming):
    names: ClassVar = {"a": "a", "b": "c"}


class Fewer(Renaming):
    def absent(self, batch_idx: int) -> set[str]:
        return {"b"}


class Whole(MultiTaskModule):
    """Declares no tasks: they are known from its losses."""

    names: ClassVar = {"a": "a", "b": "b"}

    def __init__(self) -> None:
        twin = module()
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        self.trunk, self.ends, self.criteria = twin.encoder, twin.heads, twin.loss_modules
        self.double()

    def losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = self.trunk(batch[0])
        return {
            self.names[t]: self.criteria[t](end(x), batch[1][t]) for t, end in self.ends.items()
        }


class WholeRenamed(Whole):
    names: ClassVar = {"a": "a", "b": "c"}


def checkpoint(net: Any, aggregator: Any, path: Path, **kwargs: Any) -> Path:
    fit(net, [aggregator], **kwargs).save_checkpoint(path / "one.ckpt")
    return path / "one.ckpt"


@pytest.mark.parametrize("method", [a.FAMO, a.UncertaintyWeighting, a.GradNorm])
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [(lambda: foreign(Renaming), lambda: foreign(Renamed)), (Whole, WholeRenamed)],
    ids=["taken over", "module"],
)
def test_a_renamed_task_is_refused(saved: Any, resumed: Any, method: Any, tmp_path: Path) -> None:
    path = checkpoint(saved(), method(), tmp_path)
    net = resumed()
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    with pytest.raises(ValueError, match=r"tasks \['a', 'b'\], got a batch with \['c'\]"):
        fit(net, [method()], ckpt_path=path, max_epochs=2)
    moved = torch.load(path, weights_only=True)["state_dict"]
    net.load_state_dict(moved)
    assert before.shape == nn.utils.parameters_to_vector(net.parameters()).shape


def test_methods_without_a_state_go_on_with_other_tasks(tmp_path: Path) -> None:
    path = checkpoint(foreign(Renaming), a.MGDA(), tmp_path)
    fit(foreign(Renamed), [a.MGDA()], ckpt_path=path, max_epochs=2)


@pytest.mark.filterwarnings("ignore:Expected every trainable parameter to be reached")
def test_a_task_that_is_gone_is_told_once(tmp_path: Path) -> None:
    path = checkpoint(foreign(Renaming), a.FAMO(), tmp_path)
    with pytest.warns(
        UserWarning, match=r"tasks \['a', 'b'\], got an epoch without \['b'\]"
    ) as told:
        fit(foreign(Fewer), [a.FAMO()], ckpt_path=path, max_epochs=3)
    assert sum("an epoch without" in str(w.message) for w in told) == 1


def test_a_task_that_comes_late_is_no_other_task(tmp_path: Path) -> None:
    """A checkpoint from the middle of an epoch need not know all tasks."""

    class Late(Renaming):
        def absent(self, batch_idx: int) -> set[str]:
            return {"b"} if batch_idx == 0 else set()

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(foreign(Late), [a.FAMO(), keep], enable_checkpointing=True)
    path = tmp_path / "step=1.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"][a.FAMO().state_key]["tasks"] == ["a"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        fit(foreign(Late), [a.FAMO()], ckpt_path=path, max_epochs=2)


def test_an_attribute_named_tasks_is_the_modules_own() -> None:
    class Two(Foreign):
        tasks = 2

    fit(foreign(Two), [a.FAMO()])


# What FAMO looks at again.


class OnlyTheLoss(MultiTaskModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


class OwnBatches(MultiTaskModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] * 2.0, batch[1]), batch_idx)


def test_famo_learns_whatever_the_step_returns() -> None:
    plain, own = a.FAMO(), a.FAMO()
    fit(module(), [plain])
    fit(module(kind=OnlyTheLoss), [own])
    assert plain.state_dict()["scalars"]["a"]["value"] != 0.0
    assert same(own.state_dict(), plain.state_dict())


def test_famo_looks_at_the_batch_that_was_trained_on() -> None:
    doubled = data()
    doubled.dataset.inputs = doubled.dataset.inputs * 2.0
    plain, own = a.FAMO(), a.FAMO()
    fit(module(), [plain], doubled)
    fit(module(kind=OwnBatches), [own])
    assert same(own.state_dict(), plain.state_dict())


def slopes(net: Any, batch: Any) -> dict[str, Tensor]:
    """Losses of an output and of its slope, as those of energies and forces."""
    x = batch[0].requires_grad_(True)
    energy = net.head(net.trunk(x))
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return {
        "energy": nn.functional.mse_loss(energy, batch[1]["energy"]),
        "force": nn.functional.mse_loss(slope, batch[1]["force"]),
    }


def layers(net: nn.Module) -> None:
    torch.manual_seed(0)
    net.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    net.head = nn.Linear(8, 1)
    net.double()


class Energies(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        layers(self)

    def losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return slopes(self, batch)


class ForeignEnergies(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = slopes(self, batch)
        return {"loss": sum(losses.values()), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sharpness", [[], [TaskSAM()]], ids=["plain", "flat"])
def test_famo_trains_what_differentiates_in_its_step(sharpness: list[Any]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, dtype=torch.float64, generator=g)
    targets = {"energy": x.sum(1, keepdim=True), "force": torch.ones_like(x)}
    states = []
    for net in (Energies(), ForeignEnergies()):
        famo = a.FAMO()
        fit(net, [famo, *sharpness], DataLoader(Pairs(x, targets), batch_size=4))
        assert all(entry["value"] != 0.0 for entry in famo.state_dict()["scalars"].values())
        states.append(famo.state_dict())
    assert same(*states)
