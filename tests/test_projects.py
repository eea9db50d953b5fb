"""Steps in the style of public projects: what they leave behind in the module and in the batch."""

import itertools
import random
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, LinearScalarization
from lightning_flatmtl.engine import FlatMTLError
from lightning_flatmtl.takeover import second_pass
from tests.aggregators.specs import SPECS
from tests.helpers import fit
from tests.hosts import values

Callbacks = list[pl.Callback]

METHODS: dict[str, Callable[[], Callbacks]] = {
    "FAMO": lambda: [FAMO()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.1)],
    "F-CAGrad joint": lambda: [CAGrad(), TaskSAM(0.1, point="joint")],
    "F-FAMO": lambda: [FAMO(), TaskSAM(0.1)],
    "F-sum": lambda: [LinearScalarization(), TaskSAM(0.1)],
}
methods = pytest.mark.parametrize("method", METHODS)
hosts = pytest.mark.parametrize("host", ["taken over", "module"])


class Step:
    """A step of a project; :meth:`prepare` reads the batch, and both hosts run it."""

    lr = 0.05

    def build(self) -> None:
        torch.manual_seed(2)
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)
        self.double()

    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        return batch["x"], batch["a"], batch["b"]

    def step(self, batch: Any) -> dict[str, Tensor]:
        x, a, b = self.prepare(batch)
        features = self.trunk(x)
        return {"a": mse_loss(self.a(features), a), "b": mse_loss(self.b(features), b)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def made(host: str, style: type = Step, **attributes: Any) -> Any:
    """The project in one of the hosts."""
    if host == "taken over":

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            losses = self.step(batch)
            return {"loss": losses["a"] + losses["b"], "losses": losses}

        bases: Any = (style, pl.LightningModule)
        project = type("Project", bases, {"training_step": training_step})()
    else:
        own = {"losses": lambda self, batch, batch_idx: self.step(batch)}
        project = type("Project", (style, MultiTaskModule), own)(tasks=[Task("a"), Task("b")])
    for name, value in attributes.items():
        setattr(project, name, value)
    project.build()
    return project


def batches(make: Callable[..., Any] = dict, n: int = 4) -> DataLoader:
    """The same batches every time, made anew, each a ``make(x=, a=, b=)``."""
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    made = [make(x=draw(6, 3), a=draw(6, 1), b=draw(6, 1)) for _ in range(n)]
    return DataLoader(made, batch_size=None)


# What a step leaves in the module.


class Meter:
    """A running mean, as projects have one."""

    def __init__(self) -> None:
        self.sum, self.count, self.history = 0.0, 0, []

    def update(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1
        self.history.append(value)


class Block(nn.Module):
    """A submodule that counts and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last.append(float(x.detach().sum()))
        return x


class Litters(Step):
    """Writes into every kind of plain attribute."""

    lr = 0.0

    def build(self) -> None:
        super().build()
        self.block = Block()
        self.outs, self.seen, self.recent = [], set(), deque(maxlen=3)
        self.total, self.by_task = 0.0, {"a": [], "b": {"sum": 0.0}}
        self.metrics = {"mean": torchmetrics.MeanMetric(), "all": [torchmetrics.CatMetric()]}
        self.pairs = [torchmetrics.MetricCollection({"mse": torchmetrics.MeanSquaredError()})]
        self.meter, self.meters = Meter(), {"a": Meter()}
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.noise, self.dice = torch.Generator().manual_seed(1), random.Random(1)
        self.numbers, self.older = np.random.default_rng(1), np.random.RandomState(1)
        self.norm = [nn.BatchNorm1d(5).double()]

    def step(self, batch: Any) -> dict[str, Tensor]:
        x, a, b = self.prepare(batch)
        features = self.norm[0](self.block(self.trunk(x)))
        losses = {"a": mse_loss(self.a(features), a), "b": mse_loss(self.b(features), b)}
        first, second = (float(loss.detach()) for loss in losses.values())
        self.outs.append({"a": first, "features": features})
        self.seen.add(round(first, 12))
        self.recent.append(first)
        self.total += first
        self.by_task["a"].append(first)
        self.by_task["b"]["sum"] += second
        self.by_task.setdefault("new", []).append(second)
        self.metrics["mean"].update(first)
        self.metrics["all"][0](torch.tensor([second]))
        self.pairs[0].update(torch.tensor([first]), torch.tensor([second]))
        self.meter.update(first)
        self.meters["a"].update(second)
        self.tensor += torch.tensor([first, second])
        self.array += np.array([first, second])
        torch.rand(1, generator=self.noise)
        self.dice.random(), self.numbers.random(), self.older.rand()
        self.late = [*getattr(self, "late", []), first]
        return losses

    def left(self) -> dict[str, Any]:
        return {
            "block": (self.block.calls, self.block.last),
            "containers": (len(self.outs), sorted(self.seen), list(self.recent)),
            "numbers": (self.total, str(self.by_task), self.late),
            "metrics": (
                float(self.metrics["mean"].compute()),
                self.metrics["all"][0].compute().tolist(),
                float(self.pairs[0]["mse"].compute()),
                self.pairs[0]["mse"].update_count,
            ),
            "meters": (vars(self.meter), vars(self.meters["a"])),
            "arrays": (self.tensor.tolist(), self.array.tolist()),
            "streams": (
                self.noise.get_state().tolist(),
                self.dice.getstate(),
                str(self.numbers.bit_generator.state),
                str(self.older.get_state()),
            ),
            "hidden": {k: v.tolist() for k, v in self.norm[0].state_dict().items()},
        }


@hosts
@methods
def test_plain_attributes_are_those_of_a_plain_run(host: str, method: str) -> None:
    plain, ours = made("taken over", Litters), made(host, Litters)
    fit(plain, loader=batches(), max_epochs=2)
    fit(ours, METHODS[method](), loader=batches(), max_epochs=2)
    found, expected = ours.left(), plain.left()
    assert expected["containers"][0] == expected["block"][0] == 8
    for what, value in expected.items():
        assert found[what] == value, what


class Carries(Step):
    """Reads what the batch before has left, and counts the steps for the weight of a term."""

    def build(self) -> None:
        super().build()
        self.hidden, self.steps = None, 0
        self.noise = torch.Generator().manual_seed(3)

    def step(self, batch: Any) -> dict[str, Tensor]:
        x, a, b = self.prepare(batch)
        features = self.trunk(x)
        if self.hidden is not None:
            features = features + self.hidden
        self.hidden = features.detach()
        self.steps += 1
        features = features + torch.randn(5, generator=self.noise, dtype=torch.float64)
        return {
            "a": self.steps * mse_loss(self.a(features), a),
            "b": mse_loss(self.b(features), b),
        }


@hosts
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_every_pass_begins_with_the_attributes_of_the_first(host: str, point: str) -> None:
    """With rho going to 0 the second pass is the first one."""
    runs = []
    for callbacks in ([LinearScalarization()], [LinearScalarization(), TaskSAM(1e-9, point=point)]):
        ours = made(host, Carries)
        fit(ours, callbacks, loader=batches())
        runs.append(values(ours))
    assert (runs[0] - runs[1]).norm() < 1e-7 * runs[0].norm()


class Draws(Step):
    """Takes unlabelled batches out of an iterator of its own."""

    def build(self) -> None:
        super().build()
        loader = DataLoader(torch.ones(64, 3, dtype=torch.float64))
        self.unlabelled = self.source(loader)

    source = staticmethod(iter)

    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = super().prepare(batch)
        return x + next(self.unlabelled), a, b


def endless(loader: Any) -> Any:
    while True:
        yield from loader


@hosts
@pytest.mark.parametrize("method", ["FAMO", "F-CAGrad"])
@pytest.mark.parametrize("source", [iter, endless])
def test_what_cannot_be_put_back_is_named_once(host: str, method: str, source: Any) -> None:
    ours = made(host, Draws, source=source)
    with pytest.warns(UserWarning, match=r"`self.unlabelled`, which cannot.*second_pass") as said:
        fit(ours, METHODS[method](), loader=batches(), max_epochs=2)
    assert sum("cannot be put back" in str(w.message) for w in said) == 1


class Guards(Draws):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not second_pass(self):
            self.extra = [next(self.unlabelled)]
        return Step.prepare(self, batch)


@hosts
def test_nothing_is_said_of_what_stays(host: str) -> None:
    ours = made(host, Guards)
    ours.big = torch.zeros(2**17)
    fit(ours, METHODS["F-CAGrad"](), loader=batches())


def test_a_large_tensor_that_changes_is_named() -> None:
    class Queue(Step):
        def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            self.queue[:6] = batch["x"][:, 0].detach()
            return super().prepare(batch)

    ours = made("taken over", Queue, queue=torch.zeros(2**17, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"`self.queue`"):
        fit(ours, METHODS["F-CAGrad"](), loader=batches())


# What a step does to the batch.


class Pops(Step):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        b = batch.pop("b")
        return batch.pop("x"), batch.pop("a"), b


class Scales(Step):
    """In place, as preprocessing often is; the targets too, behind a view."""

    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch["x"].div_(4.0).sub_(0.5)
        batch["a"][:2].mul_(3.0)
        return super().prepare(batch)


class ScalesCopies(Step):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = super().prepare(batch)
        return x / 4.0 - 0.5, torch.cat([3.0 * a[:2], a[2:]]), b


class Adds(Step):
    """Writes its predictions into the batch and reads them there, as SchNetPack does."""

    def step(self, batch: Any) -> dict[str, Tensor]:
        if "features" not in batch:
            batch["features"] = self.trunk(batch["x"])
        for task, head in (("a", self.a), ("b", self.b)):
            batch[f"{task} predicted"] = head(batch["features"])
        return {task: mse_loss(batch[f"{task} predicted"], batch[task]) for task in "ab"}


class Encoding(UserDict):
    """As HuggingFace's: a mapping that is no dict, with attributes too."""


@dataclass
class Record:
    x: Tensor
    a: Tensor
    b: Tensor


@dataclass
class Holder:
    parts: dict[str, Tensor]


class Graph:
    """As PyG's: attributes that lie in a store."""

    def __init__(self, **parts: Tensor) -> None:
        self.__dict__["store"] = parts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "store":
            raise AttributeError(name)
        return self.store[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.store[name] = value


class PopsAttributes(Step):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = batch.x, batch.a, batch.b
        batch.x = batch.a = batch.b = None
        return x, a, b


class PopsParts(Step):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        return batch.parts.pop("x"), batch.parts.pop("a"), batch.parts.pop("b")


class PopsNested(Step):
    def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        (x,), targets = batch
        first = targets.pop(0)
        return x, first.pop("a"), targets.pop()["b"]


def nested(x: Tensor, a: Tensor, b: Tensor) -> Any:
    return (x,), [{"a": a}, {"b": b}]


CHANGES: dict[str, tuple[type, type, Callable[..., Any]]] = {
    "popped": (Pops, Step, dict),
    "popped, HuggingFace": (Pops, Step, Encoding),
    "popped, nested": (PopsNested, Step, nested),
    "emptied dataclass": (PopsAttributes, Step, Record),
    "emptied dictionary in a dataclass": (PopsParts, Step, lambda **parts: Holder(parts)),
    "emptied graph": (PopsAttributes, Step, Graph),
    "changed in place": (Scales, ScalesCopies, dict),
    "predictions written": (Adds, Step, dict),
}


@hosts
@methods
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_changes_its_batch(host: str, method: str, change: str) -> None:
    """It trains as one that does not."""
    careless, careful, make = CHANGES[change]
    runs = []
    for style, kind in ((careful, dict), (careless, make)):
        ours = made(host, style)
        fit(ours, METHODS[method](), loader=batches(kind))
        runs.append(values(ours))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], values(made(host)))


@hosts
def test_the_first_pass_gets_the_batch_itself(host: str) -> None:
    """So that callbacks see of it what they see in plain training."""

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.keys = sorted(batch)

    sees = Sees()
    fit(made(host, Adds), [*METHODS["F-CAGrad"](), sees], loader=batches())
    assert sees.keys == ["a", "a predicted", "b", "b predicted", "features", "x"]


class InEncoder(MultiTaskModule):
    """Encoder and heads that share a batch and change it."""

    how = "in place"

    def encode(self, batch: Any) -> Any:
        inputs, targets = batch
        if self.how == "in place":
            inputs.mul_(0.5)
        elif self.how == "adds":
            targets["scale"] = 2.0 + self.encoder[0].weight.sum()
        return self.encoder(inputs if self.how != "careful" else 0.5 * inputs)

    def task_loss(self, task: Task, features: Any, batch: Any) -> Tensor | None:
        targets = batch[1]
        target = targets[task.name] if self.how == "careful" else targets.pop(task.name)
        scale = targets.get("scale", 1.0) if self.how == "adds" else 1.0
        return scale * mse_loss(self.heads[task.name](features), target)


def composed(how: str, callbacks: Callbacks) -> Any:
    torch.manual_seed(2)
    tasks = [Task(name, head=nn.Linear(5, 1), loss=nn.MSELoss()) for name in "ab"]
    ours = InEncoder(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh()),
        tasks,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    ).double()
    ours.how = how
    fit(ours, callbacks, loader=batches(lambda x, a, b: (x, {"a": a, "b": b})))
    return ours


@methods
def test_encoder_and_heads_that_change_their_batch(method: str) -> None:
    ours, careful = (values(composed(how, METHODS[method]())) for how in ("in place", "careful"))
    assert torch.equal(ours, careful)


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_what_an_encoder_leaves_in_the_batch_is_its_heads(point: str) -> None:
    ours = composed("adds", [CAGrad(), TaskSAM(1e-9, point=point)])
    assert ours.last_step.flat_gram.diagonal().max() < 1e-12 * ours.last_step.gram.max()


def test_a_large_tensor_changed_in_place_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_flatmtl.engine.passes.inputs._LARGEST_COPY", 1)
    with pytest.raises(FlatMTLError, match=r"`batch\['x'\]`.*in place") as said:
        fit(made("taken over", Scales), METHODS["F-CAGrad"](), loader=batches())
    assert "x = x / 255" in str(said.value)


@hosts
@methods
def test_an_error_in_a_second_pass_says_so(host: str, method: str) -> None:
    class Exhausted(Step):
        left = itertools.repeat(None, 1)

        def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            if next(self.left, "nothing") == "nothing":
                raise KeyError("labels")
            return super().prepare(batch)

    with pytest.raises(KeyError) as said:
        fit(made(host, Exhausted), METHODS[method](), loader=batches())
    assert "second pass" in said.value.__notes__[0]
    assert "second_pass(self)" in said.value.__notes__[0]


def test_an_error_in_the_first_pass_does_not() -> None:
    class Broken(Step):
        def prepare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            raise KeyError("labels")

    with pytest.raises(KeyError) as said:
        fit(made("taken over", Broken), METHODS["F-CAGrad"](), loader=batches())
    assert not hasattr(said.value, "__notes__")


# Physics: derivatives in the losses, tensors with labels.


class Labelled(Tensor):
    """As PINA's: a Tensor with names for its columns, which most operations lose."""

    @staticmethod
    def __new__(cls, values: Tensor, labels: list[str]) -> "Labelled":
        return values.as_subclass(cls)

    def __init__(self, values: Tensor, labels: list[str]) -> None:
        self._labels = labels

    @property
    def labels(self) -> list[str]:
        return self._labels

    def requires_grad_(self, mode: bool = True) -> "Labelled":
        changed = super().requires_grad_(mode)
        changed._labels = self._labels
        return changed

    def column(self, name: str) -> Tensor:
        return self.as_subclass(Tensor)[:, self._labels.index(name)]


class Field(nn.Module):
    """A network from labelled points to labelled values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, points: Labelled) -> Labelled:
        return Labelled(self.net(points.as_subclass(Tensor)), ["u"])


class Pinn(Step):
    """The heat equation: all parameters are shared by residual and boundary."""

    labelled = True

    def build(self) -> None:
        torch.manual_seed(2)
        self.field = Field() if self.labelled else nn.Sequential(*Field().net)
        self.double()

    def value(self, points: Tensor) -> Tensor:
        if not self.labelled:
            return self.field(points)[:, 0]
        return self.field(Labelled(points, ["x", "t"])).column("u")

    def step(self, batch: Any) -> dict[str, Tensor]:
        points = batch["x"][:, :2].clone().requires_grad_()
        (first,) = torch.autograd.grad(self.value(points).sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
        residual = (first[:, 1] - 0.1 * second[:, 0]).square().mean()
        boundary = (self.value(batch["x"][:, :2]) - batch["a"][:, 0]).square().mean()
        losses = {"a": residual, "b": boundary}
        if not self.labelled:
            return losses
        return {task: Labelled(loss, ["loss"]) for task, loss in losses.items()}


class PinnByLbfgs(Pinn):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


class PinnByAdam(Pinn):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("aggregator", SPECS)
@pytest.mark.parametrize(
    ("host", "style"),  # manual optimization has no closures
    [("taken over", PinnByAdam), ("taken over", PinnByLbfgs), ("module", PinnByAdam)],
)
@pytest.mark.filterwarnings("ignore:The direction of .* does not scale with the gradients")
def test_a_pinn(host: str, style: type, aggregator: str, flat: bool) -> None:
    """Labels on tensors and losses change nothing."""
    runs = []
    for labelled in (True, False):
        ours = made(host, style, labelled=labelled)
        before = values(ours)
        fit(ours, [SPECS[aggregator].make(), *([TaskSAM(0.05)] if flat else [])], loader=batches())
        runs.append(values(ours))
        assert torch.isfinite(runs[-1]).all()
        assert not torch.equal(runs[-1], before)
    assert torch.equal(*runs)


class Forces(Step):
    """Energies and forces; the predictions go into the batch, as in SchNetPack."""

    def step(self, batch: Any) -> dict[str, Tensor]:
        batch["x"].requires_grad_()
        batch["energy"] = self.a(self.trunk(batch["x"]))[:, 0]
        (slope,) = torch.autograd.grad(batch["energy"].sum(), batch["x"], create_graph=True)
        batch["forces"] = -slope
        batch["charge"] = self.b(self.trunk(batch["x"]))
        return {
            "a": mse_loss(batch["energy"], batch["a"][:, 0]) + batch["forces"].square().mean(),
            "b": mse_loss(batch["charge"], batch["b"]),
        }


@hosts
@methods
def test_energies_and_forces(host: str, method: str) -> None:
    class Careful(Forces):
        def step(self, batch: Any) -> dict[str, Tensor]:
            return super().step({key: value.detach() for key, value in batch.items()})

    runs = []
    for style in (Forces, Careful):
        ours = made(host, style)
        fit(ours, METHODS[method](), loader=batches())
        runs.append(values(ours))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], values(made(host, Forces)))
