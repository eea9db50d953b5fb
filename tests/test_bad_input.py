"""Bad input gets one sentence: what was expected, what came, what to do."""

import functools
import math
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError

from lightning_flatmtl import ClassificationTask, MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import (
    IMTL,
    MGDA,
    CAGrad,
    GradDrop,
    LinearScalarization,
    PCGrad,
)
from lightning_flatmtl.engine import FlatMTLError, NonFiniteError
from lightning_flatmtl.engine.processes.single import SingleProcess
from lightning_flatmtl.hosting.refusals import refuse_unfit_trainer
from lightning_flatmtl.hosting.trainer import processes_of
from tests.ddp.net import Batches
from tests.helpers import Calls, Pairs, data, encoder, fit, module, tasks, trainer
from tests.hosts import HOSTS


def says(kind: type[BaseException], *parts: str) -> Any:
    """The error, its message holding all the parts in this order."""
    return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# The company in the Trainer.


def test_two_aggregators() -> None:
    with says(MisconfigurationException, "at most one Aggregator", "got 2: CAGrad, MGDA", "Keep"):
        fit(module(), [CAGrad(), MGDA()])


def test_two_sams() -> None:
    with says(MisconfigurationException, "at most one TaskSAM", "got 2", "Keep one"):
        fit(module(), [TaskSAM(), TaskSAM(0.1)])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("arm", ["second", "each"])
@pytest.mark.parametrize("method", [IMTL(), LinearScalarization({"a": 1.0, "b": 2.0}), GradDrop()])
def test_an_arm_that_aggregates_directions_of_no_task(host: str, arm: str, method: Any) -> None:
    model, name = HOSTS[host](), type(method).__name__
    calls = Calls(model.encoder)
    with says(ValueError, f"aggregate='{arm}'", f"got {name}(", "Use aggregate='split'"):
        fit(model, [method, TaskSAM(0.1, aggregate=arm)])
    assert calls.count == 0
    assert fit(model, [method, TaskSAM(0.0, aggregate=arm)]).global_step == 3


def test_several_optimizers() -> None:
    class Two(MultiTaskModule):
        def configure_optimizers(self):
            parts = self.encoder.parameters(), self.heads.parameters()
            return [torch.optim.SGD(params, lr=0.1) for params in parts]

    with says(MisconfigurationException, "Two expects one optimizer", "got 2", "parameter group"):
        fit(module(kind=Two))


def test_an_optimizer_that_asks_for_gradients_itself() -> None:
    with says(MisconfigurationException, "one gradient a step", "got LBFGS", "Adam"):
        fit(module(optimizer=torch.optim.LBFGS))


def test_an_override_that_loses_callbacks() -> None:
    class Own(MultiTaskModule):
        def configure_callbacks(self):
            return []

    with says(MisconfigurationException, "callbacks of Own", "[*super().configure_callbacks()"):
        fit(module(kind=Own))


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_clip_val", 0.5), ("accumulate_grad_batches", 2)]
)
def test_settings_of_the_trainer(name: str, value: float) -> None:
    """Lightning's own message sends the user to automatic optimization."""
    with says(
        MisconfigurationException,
        f"MultiTaskModule expects `{name}` as an argument of its own",
        f"got Trainer({name}={value})",
        f"MultiTaskModule(..., {name}={value})",
    ):
        fit(module(), **{name: value})
    trainer(**{name: value}).validate(module(), data(), verbose=False)  # means nothing there


def test_callbacks_that_do_not_fit(tmp_path: Path) -> None:
    with says(MisconfigurationException, "StochasticWeightAveraging", "WeightAveraging instead"):
        fit(module(), [StochasticWeightAveraging(0.1)])
    by_time = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    with says(MisconfigurationException, "train_time_interval", "nothing", "every_n_train_steps"):
        fit(module(), [by_time], enable_checkpointing=True)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_gradients(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    ways_out = ("Trainer(strategy='ddp')", "ModelParallelStrategy")
    with says(MisconfigurationException, strategy.__name__, *ways_out):
        refuse_unfit_trainer(trainer)


def test_tensor_parallelism() -> None:
    strategy = object.__new__(ModelParallelStrategy)
    mesh = {"data_parallel": SimpleNamespace(size=lambda: 1)}
    strategy._device_mesh = {**mesh, "tensor_parallel": SimpleNamespace(size=lambda: 2)}
    trainer = SimpleNamespace(strategy=strategy, world_size=2)
    way_out = "data_parallel_size=2, tensor_parallel_size=1"
    with says(MisconfigurationException, "tensor parallelism over 2 devices", way_out):
        refuse_unfit_trainer(trainer)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_plain_training_is_left_to_strategies_that_hide_gradients(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy), world_size=2)
    assert type(processes_of(trainer)) is SingleProcess


# The module.


def test_no_tasks() -> None:
    for none in ([], None):
        with says(ValueError, "`tasks` must hold at least one Task, got none", "override `losses`"):
            MultiTaskModule(encoder(), none)


def test_two_tasks_of_one_name() -> None:
    with says(ValueError, "`tasks` must have different names", "['a']"):
        MultiTaskModule(encoder(), [*tasks(), *tasks()[:1]])


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a b", 3, None])
def test_names_of_tasks(name: Any) -> None:
    with says(ValueError, "`name` must be a non-empty string", f"got {name!r}"):
        Task(name)


@pytest.mark.parametrize("name", ["keys", "training", "type", "forward"])
def test_names_that_torch_needs(name: str) -> None:
    with says(ValueError, "attribute of torch's ModuleDict", repr(name), f"'{name}_task'"):
        Task(name)


def test_arguments_of_a_task() -> None:
    with says(TypeError, "`head` must be an nn.Module, got function"):
        Task("a", head=lambda x: x)
    with says(TypeError, "`loss` must be callable", "got str"):
        Task("a", loss="mse")
    with says(TypeError, "`metrics` must be a mapping", "got list"):
        Task("a", metrics=[MeanSquaredError()])
    with says(TypeError, "Metric 'mse' must be a Metric, got MSELoss"):
        Task("a", metrics={"mse": nn.MSELoss()})
    with says(ValueError, "'loss'", "the task's loss"):
        Task("a", metrics={"loss": MeanSquaredError()})


def test_parts_of_a_module() -> None:
    with says(TypeError, "`tasks` must be Task objects, got str"):
        MultiTaskModule(encoder(), ["a"])
    with says(ValueError, "`encoder` must be a module, got None", "override `encode`"):
        MultiTaskModule(None, tasks())
    with says(ValueError, "Task 'a' must have a head"):
        MultiTaskModule(encoder(), [Task("a", loss=nn.MSELoss())])
    with says(ValueError, "Task 'a' must have a loss"):
        MultiTaskModule(encoder(), [Task("a", head=nn.Linear(5, 1))])


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("gradient_clip_val", -1.0, "[0, inf)"),
        ("gradient_clip_val", math.nan, "[0, inf)"),
        ("gradient_clip_val", math.inf, "[0, inf)"),
        ("gradient_clip_algorithm", "l1", "'norm' or 'value'"),
        ("accumulate_grad_batches", 0, "integer >= 1"),
        ("accumulate_grad_batches", 1.5, "integer >= 1"),
        ("lr_scheduler_config", {"frequncy": 2}, "'frequency'"),
    ],
)
def test_settings_of_the_module(argument: str, value: Any, expected: str) -> None:
    with says(ValueError, f"`{argument}` must", expected, "got"):
        module(**{argument: value})


# Radii, constants, matrices.


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf, "0.1", True])
@pytest.mark.parametrize("argument", ["rho", "rho_shared", "rho_heads"])
def test_radii(argument: str, value: Any) -> None:
    with says(ValueError, f"`{argument}` must be in [0, inf), got {value!r}"):
        TaskSAM(**{argument: value})


def test_choices_of_sam() -> None:
    with says(ValueError, "`point` must be 'separate' or 'joint', got 'both'"):
        TaskSAM(point="both")
    choices = "'split', 'direct', 'second' or 'each'"
    with says(ValueError, f"`aggregate` must be {choices}, got 'sum'"):
        TaskSAM(aggregate="sum")


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (CAGrad, "c", -1.0),
        (CAGrad, "c", math.nan),
        (MGDA, "normalization", "l1"),
        (PCGrad, "reduction", "max"),
        (PCGrad, "seed", -1),
        (PCGrad, "seed", 0.5),
        (IMTL, "lr", 0.0),
        (IMTL, "lr", math.nan),
        (LinearScalarization, "weights", [1.0, -1.0]),
        (LinearScalarization, "weights", {"a": math.nan}),
    ],
)
def test_arguments_of_aggregators(make: type, argument: str, value: Any) -> None:
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    shown = shown[-1] if isinstance(shown, list) else shown
    with says(ValueError, f"`{argument}` must be", f"got {shown!r}"):
        make(**{argument: value})


@pytest.mark.parametrize(
    ("matrix", "got"),
    [
        (torch.zeros(3), "got [3]"),
        (torch.zeros(2, 2, 2), "got [2, 2, 2]"),
        (torch.zeros(0, 3), "got [0, 3]"),
        ([[1.0, 2.0]], "got list"),
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_matrices(matrix: Any, got: str) -> None:
    with says(ValueError, "`jacobian` must be", got):
        CAGrad()(matrix)


def test_rows_that_are_not_finite() -> None:
    matrix = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    with says(NonFiniteError, "gradient of task 'depth' must be finite"):
        MGDA()(matrix, tasks=["seg", "depth"])
    assert issubclass(NonFiniteError, FlatMTLError)


def test_losses_beside_a_matrix() -> None:
    with says(ValueError, "`losses` must have shape [2], got [3]"):
        MGDA("loss")(torch.eye(2), losses=[1.0, 2.0, 3.0])
    with says(ValueError, "needs the losses", "`losses=`"):
        MGDA("loss")(torch.eye(2))
    with says(ValueError, "`tasks` must name 2 rows, got 1"):
        MGDA()(torch.eye(2), tasks=["a"])


def test_weights_that_do_not_fit_the_tasks() -> None:
    with says(ValueError, "`weights` must have an entry for every task", "['b']", "['a', 'c']"):
        fit(module(), [LinearScalarization({"a": 1.0, "c": 1.0})])
    with says(ValueError, "`weights` must have 2 entries", "['a', 'b']", "got 3"):
        fit(module(), [LinearScalarization([1.0, 1.0, 1.0])])


# Baselines.


def measured(**kwargs: Any) -> MultiTaskModule:
    made = [
        ClassificationTask("left", 5, 3),
        Task("b", nn.Linear(5, 2), nn.MSELoss(), {"mse": MeanSquaredError()}),
    ]
    return MultiTaskModule(encoder(), made, **kwargs)


@pytest.mark.parametrize(
    ("baselines", "parts"),
    [
        ({"left/accuracy": 0.9}, ["'b/mse' has no baseline", "'left/accuracy'"]),
        (
            {"left/accuracy": 0.9, "b/mse": 1.0, "b/mae": 1.0},
            ["do not exist", "'b/mae'", "'left/accuracy', 'b/mse'"],
        ),
        ({"left/accuracy": 0.0, "b/mse": 1.0}, ["'left/accuracy'", "not zero", "got 0.0"]),
        ({"left/accuracy": math.nan, "b/mse": 1.0}, ["'left/accuracy'", "finite", "got nan"]),
        ({"left/accuracy": "high", "b/mse": 1.0}, ["'left/accuracy'", "number", "'high'"]),
        ({}, ["has no baseline"]),
    ],
)
def test_baselines(baselines: dict[str, Any], parts: list[str]) -> None:
    with says(ValueError, *parts):
        measured(baselines=baselines)


def test_files_of_baselines(tmp_path: Path) -> None:
    with says(FileNotFoundError, "no file of baselines", "nowhere.yaml"):
        measured(baselines=str(tmp_path / "nowhere.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with says(ValueError, "must hold a mapping", "got list"):
        measured(baselines=str(tmp_path / "list.yaml"))


def test_baselines_need_metrics_with_a_direction() -> None:
    with says(ValueError, "at least one metric, got none"):
        module(baselines={"a/accuracy": 0.9})
    task = Task("a", nn.Linear(5, 1), nn.MSELoss(), {"mean": MeanMetric()})
    with says(ValueError, "`higher_is_better`", "'a/mean'", "got None"):
        MultiTaskModule(encoder(), [task], baselines={"a/mean": 1.0})


# Batches.


def named(*names: str, of: str = "ab") -> DataLoader:
    """The data with its targets under other names."""
    loader = data()
    targets = loader.dataset.targets
    renamed = {name: targets[task] for name, task in zip(names, of, strict=True)}
    return DataLoader(Pairs(loader.dataset.inputs, renamed), batch_size=8)


def test_a_misspelt_task() -> None:
    """Targets beyond the tasks are allowed, so that only the epoch's end can tell."""
    model = MultiTaskModule(
        encoder(),
        [Task("depth", nn.Linear(5, 3), nn.CrossEntropyLoss()), *tasks()[1:]],
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    ).double()
    with says(
        MisconfigurationException,
        "got none with 'depth', but targets of ['depths']",
        "Did you mean 'depths'?",
    ):
        fit(model, [CAGrad()], named("depths", "b"))


def test_targets_beyond_the_tasks() -> None:
    """Whether a first batch lacks ``depth`` and has ``depth_mask`` depends on the shuffling."""
    model = MultiTaskModule(
        encoder(),
        [Task("depth", nn.Linear(5, 3), nn.CrossEntropyLoss()), *tasks()[1:]],
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    ).double()
    first, whole = list(named("depth_mask", "b")), list(named("depth", "b"))
    done = fit(model, [CAGrad()], Batches([first[0], *whole[1:]]))
    assert done.global_step == 3
    aside = [(x, {"depth_mask": y["depth_mask"]}) for x, y in first]  # nothing of any task
    assert fit(model, [CAGrad()], Batches([aside[0], *whole[1:]])).global_step == 2


def test_a_task_that_never_comes() -> None:
    with says(MisconfigurationException, "every task", "got none with 'b'", "remove the task"):
        fit(module(), [CAGrad()], named("a", of="a"))


@pytest.mark.parametrize("limit", [{"fast_dev_run": True}, {"limit_train_batches": 2}])
def test_a_task_may_be_absent_from_a_part_of_the_epoch(limit: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="No batch so far had targets of 'b'"):
        fit(module(), [CAGrad()], named("a", of="a"), **limit)
    with says(MisconfigurationException, "got none with 'b'"):
        fit(module(), [CAGrad()], named("a", of="a"), limit_train_batches=1.0)


def test_readers_of_their_own_batches_name_targets_as_they_like() -> None:
    class Own(MultiTaskModule):
        def losses(self, batch, batch_idx):
            features = self.encoder(batch[0])
            targets = {"a": batch[1]["as"], "b": batch[1]["bs"]}
            return {t.name: t.loss(self.heads[t.name](features), targets[t]) for t in self.tasks}

    fit(module(kind=Own), [CAGrad()], named("as", "bs"))


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (TensorDataset(torch.zeros(8, 1, 6, 6)), "a list of ['Tensor']"),
        (TensorDataset(torch.zeros(8, 1, 6, 6), torch.zeros(8)), "['Tensor', 'Tensor']"),
        ([{"image": torch.zeros(1, 6, 6), "label": 1}] * 8, "a mapping with the keys"),
        (torch.zeros(8, 1, 6, 6), "got Tensor"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_batches_of_another_form(loader: Any, got: str, verb: str) -> None:
    kind = (ValueError, MisconfigurationException)
    with says(kind, "`(inputs, {task: target})`", "`{task: (inputs, target)}`", got, "override"):
        getattr(trainer(), verb)(module(), DataLoader(loader, batch_size=4))


# Losses and gradients.


class Losses(MultiTaskModule):
    """Bends the loss of task "b"."""

    bend: Any = None

    def task_loss(self, task, features, batch):
        loss = super().task_loss(task, features, batch)
        return type(self).bend(loss) if task == "b" else loss


def bent(how: Any) -> Any:
    return module(kind=type("Bent", (Losses,), {"bend": staticmethod(how)}))


METHODS = [[], [CAGrad()], [TaskSAM()], [LinearScalarization()]]


@pytest.mark.parametrize("callbacks", METHODS)
def test_losses(callbacks: list[pl.Callback]) -> None:
    with says(ValueError, "task 'b' must be a scalar tensor, got a tensor of shape [3]", ".mean()"):
        fit(bent(lambda loss: loss.repeat(3)), callbacks)
    with says(ValueError, "task 'b' must be a scalar tensor, got float"):
        fit(bent(lambda loss: loss.item()), callbacks)
    with says(ValueError, "task 'b' must depend on a trainable parameter", "Unfreeze"):
        fit(bent(lambda loss: loss.detach()), callbacks)
    for value in (math.nan, math.inf):
        with says(NonFiniteError, "loss of task 'b' must be finite", f"got {value}", "batch"):
            fit(bent(lambda loss, value=value: loss * value), callbacks)


@pytest.mark.parametrize("callbacks", [[CAGrad()], [TaskSAM()]])
def test_gradients_that_are_not_finite(callbacks: list[pl.Callback]) -> None:
    """The square root has an infinite slope at zero, its value is fine."""
    with says(NonFiniteError, "gradient of task 'b' must be finite", "got nan"):
        fit(bent(lambda loss: loss + (loss - loss).sqrt()), callbacks)


def test_gradients_that_are_not_finite_at_the_perturbed_point() -> None:
    class Explodes(MultiTaskModule):
        def task_loss(self, task, features, batch):
            loss = super().task_loss(task, features, batch)
            return loss * math.nan if self.second_pass and task == "b" else loss

    with says(NonFiniteError, "perturbed point of task 'b'", "rho"):
        fit(module(kind=Explodes), [TaskSAM()])


# What is said once, as a warning.


class Spare(MultiTaskModule):
    """Has layers that no loss reaches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize("callbacks", METHODS)
def test_parameters_that_no_loss_reaches(callbacks: list[pl.Callback]) -> None:
    with pytest.warns(UserWarning, match=r"got 2 that none reaches: 'spare.weight', 'spare.bias'"):
        fit(module(kind=Spare), callbacks, max_epochs=2)


def test_parameters_of_unnamed_tasks() -> None:
    """Where `losses` names the tasks, all of the first epoch counts."""

    class Anonymous(MultiTaskModule):
        def __init__(self, spare: bool) -> None:
            super().__init__(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
            self.trunk, self.a, self.b = nn.Linear(36, 5), nn.Linear(5, 2), nn.Linear(5, 2)
            self.spare = nn.Linear(2, 2) if spare else None

        def losses(self, batch, batch_idx):
            out = self.b if batch_idx == 2 else self.a
            features = self.trunk(batch[0].flatten(1))
            return {f"task {batch_idx == 2}": (out(features) - batch[1]["b"]).square().mean()}

    fit(Anonymous(spare=False).double(), [CAGrad()])
    with pytest.warns(UserWarning, match="'spare.weight', 'spare.bias'"):
        fit(Anonymous(spare=True).double(), [CAGrad()])


def dead(**kwargs: Any) -> Any:
    return bent_all(lambda loss: loss * 0.0, **kwargs)


def bent_all(how: Any, **kwargs: Any) -> Any:
    class All(MultiTaskModule):
        def task_loss(self, task, features, batch):
            return how(super().task_loss(task, features, batch))

    return module(kind=All, **kwargs)


def test_training_that_has_died() -> None:
    advice = r"for 10 steps.*lower rho, which is 0.3 \(shared\) and 0.2 \(heads\), plain"
    with pytest.warns(RuntimeWarning, match=advice) as caught:
        fit(dead(), [CAGrad(), TaskSAM(0.3, rho_heads=0.2)], max_epochs=8)
    assert [w.category for w in caught].count(RuntimeWarning) == 1
    with pytest.warns(RuntimeWarning, match="exactly zero for 10 steps.*Lower the learning rate"):
        fit(dead(), [CAGrad()], max_epochs=8)
    fit(dead(), [CAGrad(), TaskSAM()], max_epochs=3)  # nine steps, and a warning is an error


def test_a_plateau_scheduler_without_a_monitor() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with says(MisconfigurationException, "ReduceLROnPlateau needs the name", "'monitor'"):
        fit(module(lr_scheduler=plateau))


def test_an_interval_that_does_not_exist() -> None:
    steps = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    with says(MisconfigurationException, "`interval`", "'step' or 'epoch'", "'batch'"):
        fit(module(lr_scheduler=steps, lr_scheduler_config={"interval": "batch"}))


def test_predicting_without_an_encoder() -> None:
    class Own(MultiTaskModule):
        def losses(self, batch, batch_idx):
            return {}

    with says(NotImplementedError, "Own", "`forward`", "`predict_step`"):
        trainer().predict(Own(), data())


def test_half_precision_needs_no_loss_scaling() -> None:
    fit(module().float(), [MGDA(), TaskSAM()], single_precision(), precision="bf16-mixed")


def test_features_and_task_sam_are_refused_together() -> None:
    with pytest.raises(MisconfigurationException, match="TaskSAM perturbs parameters and needs"):
        fit(module(gradients="features"), [TaskSAM(0.1)])
    with pytest.raises(ValueError, match="'parameters', 'features' or 'gram', got 'rows'"):
        module(gradients="rows")


def single_precision() -> DataLoader:
    inputs = torch.randn(8, 1, 6, 6)
    targets = {"a": torch.zeros(8, dtype=torch.int64), "b": torch.randn(8, 2)}
    return DataLoader(Pairs(inputs, targets), batch_size=8)


def test_classes_and_instances_in_the_place_of_makers() -> None:
    with says(TypeError, "`loss` must be callable", "nn.MSELoss()", "got the class MSELoss"):
        Task("a", nn.Linear(2, 2), nn.MSELoss)
    with says(TypeError, "`optimizer` must be a function that makes one", "got str"):
        MultiTaskModule(nn.Linear(2, 2), tasks(), optimizer="SGD")
    with says(TypeError, "`encoder` must be an nn.Module, got", "Linear"):
        MultiTaskModule(nn.Linear, tasks())
    with says(TypeError, "`tasks` must be a list of Task objects, got Task"):
        MultiTaskModule(nn.Linear(2, 2), tasks()[0])


def test_an_own_training_step_that_trains_nothing() -> None:
    class Habit(MultiTaskModule):
        def training_step(self, batch, batch_idx):
            return sum(self.losses(batch, batch_idx).values())

    with says(MisconfigurationException, "nothing is trained", "Override `losses`"):
        fit(module(kind=Habit))


def test_losses_that_are_no_mapping() -> None:
    class Sum(MultiTaskModule):
        def losses(self, batch, batch_idx):
            return self.encoder(batch[0]).sum()

    words = "`losses` must return a mapping from task names"
    with says(ValueError, words, "got a tensor of shape"):
        fit(module(kind=Sum))
