"""Names that are no task's, labels that are none, tasks that are absent: said at once, by name."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import (
    DBMTL,
    FAMO,
    GLS,
    MGDA,
    STCH,
    CAGrad,
    GradNorm,
    LinearScalarization,
)
from lightning_flatmtl.engine import NonFiniteError
from lightning_flatmtl.takeover import host_of
from tests.ddp.net import Batches
from tests.helpers import Calls, assert_close, data, fit, module, tasks, trainer
from tests.hosts import HOSTS, Foreign, foreign, smooth_trunk
from tests.test_bad_input import says

# The names of losses and of data sets.


def returning(make: Any) -> Any:
    """A module whose ``losses`` returns what ``make`` makes of them."""

    class Own(MultiTaskModule):
        def losses(self, batch, batch_idx):
            z = self.encoder(batch[0])
            own = {t.name: t.loss(self.heads[t.name](z), batch[1][t.name]) for t in self.tasks}
            return make(own)

    return module(kind=Own)


@pytest.mark.parametrize("callbacks", [[], [CAGrad()]], ids=["plain", "CAGrad"])
def test_a_loss_of_no_task(callbacks: Any) -> None:
    net = returning(lambda losses: {"a": losses["a"], "bb": losses["b"]})
    with says(ValueError, "tasks ['a', 'b']", "'bb'", "Did you mean 'b'?", "`penalty`"):
        fit(net, callbacks)
    with says(ValueError, "'bb'", "Did you mean 'b'?"):
        trainer().validate(net, data(), verbose=False)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_losses_that_are_one_scalar(stage: str) -> None:
    net = returning(lambda losses: sum(losses.values()))
    with says(ValueError, "a mapping from task names", "a tensor of shape []", '{"a": loss_a'):
        getattr(trainer(), stage)(net, data())


def test_a_loss_of_none_is_absent() -> None:
    net = returning(lambda losses: {**losses, "b": None})
    with pytest.warns(UserWarning, match="No batch so far had targets of 'b'"):
        fit(net, [CAGrad()], val=data(), limit_train_batches=2)


def test_a_key_that_is_no_task() -> None:
    def one(task: str) -> DataLoader:
        return DataLoader([(x, y[task]) for x, y in data().dataset], batch_size=8)

    net = MultiTaskModule(nn.Flatten(), [Task("left", nn.Linear(36, 3), nn.CrossEntropyLoss())])
    with says(ValueError, "'lefd' beside the tasks ['left']", "Did you mean 'left'?"):
        fit(net.double(), [], CombinedLoader({"left": one("a"), "lefd": one("a")}))


class Three(MultiTaskModule):
    """The tasks of the data and one more, ``c``."""


def three() -> Any:
    torch.manual_seed(5)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
    own = [*tasks(), Task("c", nn.Linear(5, 2), nn.MSELoss())]
    return Three(trunk, own, lambda params: torch.optim.SGD(params, lr=0.1)).double()


def beside(names: tuple[str, ...] = ("AB", "c")) -> tuple[Any, Any]:
    """The batches of a data set with two tasks, and those of one with one."""
    several = list(data(24))
    single = [(x, y["b"]) for x, y in data(12, seed=1, batch_size=4)]
    return several, single


@pytest.mark.parametrize("sam", [[], [TaskSAM(0.05)]], ids=["plain", "SAM"])
def test_a_data_set_with_several_tasks_beside_another(sam: Any) -> None:
    """As with a data set per task, but with one pass of the encoder for the two."""
    several, single = beside()
    together = [{"AB": ab, "c": c} for ab, c in zip(several, single, strict=True)]
    apart = [
        {"a": (ab[0], ab[1]["a"]), "b": (ab[0], ab[1]["b"]), "c": c}
        for ab, c in zip(several, single, strict=True)
    ]
    nets = three(), three()
    counts = [Calls(net.encoder) for net in nets]
    runs = [
        fit(net, [CAGrad(), *sam], Batches(batches), Batches(batches), num_sanity_val_steps=0)
        for net, batches in zip(nets, (together, apart), strict=True)
    ]
    assert_close(*nets, 1e-10)
    shown = [{k: float(v) for k, v in run.callback_metrics.items()} for run in runs]
    assert shown[0] == pytest.approx(shown[1], rel=1e-6)
    assert counts[1].count - counts[0].count == 6  # three batches of each of the two stages


def test_a_task_in_two_data_sets() -> None:
    (ab, *_), (c, *_) = beside()
    with says(ValueError, "Task 'b'", "'AB' and in 'b'"):
        fit(three(), [], Batches([{"AB": ab, "b": (c[0], c[1])}]))


# The sum of what is logged.


def test_the_validation_loss_is_the_sum_of_the_tasks() -> None:
    """Ten times as many labels of one task do not make the other's loss smaller."""
    batches = [(x, y if i == 0 else {"a": y["a"]}) for i, (x, y) in enumerate(data(56))]
    for of in ([batches], [batches, batches[::-1][:3] + batches[:1]]):
        net = module()
        loaders = [Batches(one) for one in of]
        (*shown,) = trainer().validate(net, loaders, verbose=False)
        for i, found in enumerate(shown):
            end = f"/dataloader_idx_{i}" if len(of) > 1 else ""
            parts = [found[f"val/{task}/loss{end}"] for task in "ab"]
            assert found[f"val/loss{end}"] == pytest.approx(sum(parts), rel=1e-6)
        again = trainer().validate(net, loaders, verbose=False)
        assert again == shown


# Labels.


def spoilt(task: str, value: float) -> Any:
    loader = data()
    loader.dataset.targets[task][3] = value
    return loader


@pytest.mark.parametrize("callbacks", [[], [CAGrad()]], ids=["plain", "CAGrad"])
def test_a_class_that_does_not_exist(callbacks: Any) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - torch's own kind
        fit(module(), callbacks, spoilt("a", -1))
    (note,) = caught.value.__notes__
    assert "task 'a'" in note
    assert "from -1 to 2" in note
    assert "Task('a', ..., missing=-1)" in note


def test_a_class_that_a_metric_does_not_know() -> None:
    torch.manual_seed(3)
    metric = {"accuracy": MulticlassAccuracy(3)}
    task = Task("kind", nn.Linear(5, 3), nn.CrossEntropyLoss(ignore_index=7), metric)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    net = MultiTaskModule(trunk, [task]).double()
    batches = [(x, {"kind": y["a"]}) for x, y in spoilt("a", 7)]
    with pytest.raises(RuntimeError) as caught:
        trainer().validate(net, Batches(batches), verbose=False)
    (note,) = caught.value.__notes__
    assert "task 'kind'" in note
    assert "missing=" in note


@pytest.mark.parametrize("callbacks", [[LinearScalarization()], [CAGrad()]], ids=["LS", "CAGrad"])
def test_a_label_of_nan(callbacks: Any) -> None:
    with pytest.raises(NonFiniteError, match="loss of task 'b'") as caught:
        fit(module(), callbacks, spoilt("b", float("nan")))
    (note,) = caught.value.__notes__
    assert "Task 'b' has NaN among its targets" in note
    assert "missing=float('nan')" in note


# Absent tasks.


class TimesZero(Foreign):
    def losses(self, batch):
        found = super().losses(batch)
        return {**found, "b": found["b"] * 0}


class OursTimesZero(MultiTaskModule):
    def losses(self, batch, batch_idx):
        z = self.encoder(batch[0])
        found = {t.name: t.loss(self.heads[t.name](z), batch[1][t.name]) for t in self.tasks}
        return {**found, "b": found["b"] * 0}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("make", [MGDA, CAGrad, LinearScalarization])
def test_an_absent_task_as_a_loss_times_zero(host: str, make: Any) -> None:
    net = module(kind=OursTimesZero) if host == "module" else foreign(TimesZero)
    with pytest.warns(UserWarning, match="The loss of 'b' is exactly zero") as told:
        fit(net, [make()], max_epochs=2)
    assert len([w for w in told if "exactly zero" in str(w.message)]) == 1


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("make", [GradNorm, FAMO, STCH, GLS, DBMTL])
def test_methods_on_losses_say_to_leave_an_absent_task_out(host: str, make: Any) -> None:
    """A constant added to a loss that stands for nothing would be trained on."""
    net = module(kind=OursTimesZero) if host == "module" else foreign(TimesZero)
    words = "Leave a task out of a batch that has nothing for it (no loss times zero)"
    with says(ValueError, "needs positive losses, got 0.0 for task 'b'", words):
        fit(net, [make()])


# The module's own ways.


class Late:
    """Builds its layers when the Trainer asks for them, and declares them."""

    when = "setup"

    def build(self) -> None:
        source = foreign()
        self.encoder, self.heads = source.encoder, source.heads

    def setup(self, stage):
        if self.when == "setup":
            self.build()

    def configure_model(self):
        if self.when == "configure_model":
            self.build()

    def shared_parameters(self):
        return [*self.encoder.parameters(), *self.heads["a"][0].parameters()]


class LateForeign(Late, Foreign):
    def __init__(self, when: str) -> None:
        pl.LightningModule.__init__(self)
        self.when = when
        self.criteria = nn.ModuleDict({"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def task_parameters(self, task):
        return self.heads["a"][2].parameters() if task == "a" else None


class LateModule(Late, MultiTaskModule):
    def losses(self, batch, batch_idx):
        z = self.encoder(batch[0])
        return {t.name: t.loss(self.heads[t.name](z), batch[1][t.name]) for t in self.tasks}

    def task_parameters(self, task):
        return self.heads["a"][2].parameters() if task == "a" else None


@pytest.mark.parametrize("when", ["setup", "configure_model"])
@pytest.mark.parametrize("host", HOSTS)
def test_layers_that_are_built_late_are_declared(host: str, when: str) -> None:
    if host == "module":
        bare = [Task("a", loss=nn.CrossEntropyLoss()), Task("b", loss=nn.MSELoss())]
        net: Any = LateModule(None, bare, lambda params: torch.optim.SGD(params, lr=0.1))
        net.when = when
    else:
        net = LateForeign(when)
    shared: list[Any] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            partition = host_of(pl_module).engine.partition
            shared.extend(partition.shared(list(pl_module.parameters())))

    fit(net, [CAGrad(), Look()])
    assert {id(p) for p in shared} == {id(p) for p in net.shared_parameters()}


@pytest.mark.parametrize("make", [CAGrad, LinearScalarization, FAMO])
@pytest.mark.parametrize("own", [2, None, ["a", "c"]])
def test_an_attribute_of_the_name_tasks(own: Any, make: Any) -> None:
    class Counts(Foreign):
        tasks = own

    assert fit(foreign(Counts), [make()]).global_step == 3


@pytest.mark.parametrize("again", ["validate", "test", "fit"])
def test_further_runs_of_a_trainer_are_quiet(again: str, caplog: Any) -> None:
    net, made = module(), trainer([CAGrad()], max_epochs=1)
    made.fit(net, data())
    with caplog.at_level(logging.INFO):
        getattr(made, again)(net, data())
        getattr(made, again)(net, data())
    assert "will override" not in caplog.text
    kinds = [type(c).__name__ for c in made.callbacks]
    assert kinds.count("FitReports") == kinds.count("ManualOptimization") == 1


# A callback that freezes, as projects with a pretrained trunk use it.


class Finetunes(MultiTaskModule):
    @property
    def backbone(self):
        return self.encoder


class ForeignFinetunes(Foreign):
    @property
    def backbone(self):
        return self.encoder

    def configure_optimizers(self):
        return self._make_optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sam", [[], [TaskSAM(0.05)]], ids=["plain", "SAM"])
def test_a_trunk_that_thaws(host: str, sam: Any) -> None:
    kinds: dict[str, Any] = {
        "module": (module, Finetunes),
        "taken over": (foreign, ForeignFinetunes),
    }
    make, kind = kinds[host]
    net = make(kind=kind, trunk=smooth_trunk()).double()
    moved: list[bool] = []
    start = [p.detach().clone() for p in net.encoder.parameters()]

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pairs = zip(pl_module.encoder.parameters(), start, strict=True)
            moved.append(any(not torch.equal(p, q) for p, q in pairs))

    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)
    fit(net, [thaw, CAGrad(), *sam, Look()], max_epochs=3)
    assert moved == [False, True, True]
