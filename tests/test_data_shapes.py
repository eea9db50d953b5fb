"""Labels that are missing, tasks that are absent, and data sets of different sizes."""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import (
    DBMTL,
    FAMO,
    CAGrad,
    DynamicWeightAverage,
    GradNorm,
    GradVac,
    LinearScalarization,
    PCGrad,
    UncertaintyWeighting,
)
from lightning_flatmtl.takeover import host_of
from tests import naive
from tests.helpers import Pairs, assert_close, assert_identical, fit, sgd, trainer
from tests.hosts import Foreign, values
from tests.test_bad_input import says

NAN = math.nan
no_loss = pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")


def tasks(metrics: bool = True) -> list[Task]:
    torch.manual_seed(1)
    accuracy = {"accuracy": MulticlassAccuracy(3, average="micro")} if metrics else None
    mse = {"mse": MeanSquaredError()} if metrics else None
    return [
        Task("a", nn.Linear(5, 3), nn.CrossEntropyLoss(), accuracy, missing=-1),
        Task("b", nn.Linear(5, 2), nn.MSELoss(), mse, missing=NAN),
    ]


def trunk() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh())


def partly(**kwargs: Any) -> MultiTaskModule:
    settings = {"optimizer": sgd, **kwargs}
    return MultiTaskModule(trunk(), tasks(), **settings).double()


class ForeignPartly(Foreign):
    """Does by hand, with indices, what ``missing`` does."""

    absent: Callable[[dict[str, Tensor]], Any] = staticmethod(lambda losses: losses)

    def training_step(self, batch, batch_idx):
        losses: dict[str, Any] = {}
        features = self.encoder(batch[0])
        for task, target in batch[1].items():
            labelled = target != -1 if task == "a" else ~target.isnan().all(1)
            rows = labelled.nonzero()[:, 0]
            if len(rows):
                output = self.heads[task](features[rows])
                losses[task] = self.criteria[task](output, target[rows])
        return {"losses": self.absent(losses)} if losses else self.nothing(losses)

    def nothing(self, losses: dict[str, Tensor]) -> Any:
        return {"losses": losses}


def labels(*batches: tuple[list[int], list[int]], size: int = 4, seed: int = 0) -> DataLoader:
    """Batches of ``size``; for each the samples that have a label of "a" and of "b"."""
    g = torch.Generator().manual_seed(seed)
    n = size * len(batches)
    classes = torch.randint(0, 3, (n,), generator=g)
    vectors = torch.randn(n, 2, generator=g, dtype=torch.float64)
    for i, (of_a, of_b) in enumerate(batches):
        for k in range(size):
            if k not in of_a:
                classes[size * i + k] = -1
            if k not in of_b:
                vectors[size * i + k] = NAN
    inputs = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return DataLoader(Pairs(inputs, {"a": classes, "b": vectors}), batch_size=size)


ALL = [0, 1, 2, 3]
MIXED = [([0, 1, 2], [1, 3]), (ALL, [2]), ([0], ALL), ([1, 2], [0, 3])]


def naive_losses(
    net: nn.Module, batch: Any, rows: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Callable[[naive.Params], Tensor]]:
    """The losses of labelled samples as functions of the parameters; absent tasks left out."""

    def function(task: str, inputs: Tensor, target: Tensor):
        def loss(params: naive.Params) -> Tensor:
            def part(name: str) -> naive.Params:
                start = f"{name}."
                return {k[len(start) :]: v for k, v in params.items() if k.startswith(start)}

            features = functional_call(net.encoder, part("encoder"), (inputs,))
            output = functional_call(net.heads[task], part(f"heads.{task}"), (features,))
            return (nn.CrossEntropyLoss() if task == "a" else nn.MSELoss())(output, target)

        return loss

    found = {}
    for task in ("a", "b"):
        inputs, target = batch[task] if isinstance(batch, dict) else (batch[0], batch[1].get(task))
        if target is None:
            continue
        missing = target == -1 if task == "a" else target.isnan().all(1)
        keep = [i for i, gone in enumerate(missing.tolist()) if not gone]
        if keep:
            found[task] = function(task, inputs[keep], target[keep])
    return found


def naive_fit(net: Any, batches: Any, aggregate: Any, optimizer: Any = sgd, **settings) -> Any:
    """Train by hand; a head whose task is absent has no gradient, as the trunk without any."""
    names = dict(net.named_parameters())
    shared = [n for n in names if n.startswith("encoder.")]
    heads = {t: [n for n in names if n.startswith(f"heads.{t}.")] for t in ("a", "b")}
    made = optimizer(net.parameters())
    for batch in batches:
        losses = naive_losses(net, batch)
        if not losses:
            continue
        at = {n: p.detach().clone() for n, p in names.items()}
        grads = naive.f_mtl_gradients(losses, at, shared, heads, aggregate, **settings)
        for n, p in names.items():
            p.grad = grads.get(n)
        made.step()
    return net


def one_or_two(of_two: Any, of_one: float = 1.0) -> Any:
    """A naive direction that also knows what to do with a single row."""
    return lambda rows, losses: of_two(rows, losses) if len(rows) > 1 else of_one * rows[0]


NAIVE = {
    "none": (None, naive.ls),
    "LS": (LinearScalarization, naive.ls),
    "PCGrad": (PCGrad, one_or_two(naive.pcgrad)),
    # With one task g0 = g_w = g: (1 + c) / (1 + c^2) g.
    "CAGrad": (lambda: CAGrad(0.4), one_or_two(naive.cagrad(0.4), 1.4 / 1.16)),
}
ABSENT = [([0, 1, 2], [1, 3]), (ALL, []), ([], ALL), ([], []), ([1], [2]), (ALL, [])]


@no_loss
@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rho": 0.05},
        {"rho": 0.5, "adaptive": True, "point": "joint"},
        {"rho": 0.05, "arm": "direct"},
    ],
)
@pytest.mark.parametrize("batches", [MIXED, ABSENT], ids=["mixed", "absent"])
def test_against_the_naive_loop(host: str, name: str, settings: Any, batches: Any) -> None:
    make, aggregate = NAIVE[name]
    model = partly()
    reference = copy.deepcopy(model)
    if host == "taken over":
        model = ForeignPartly(model)
    sam = {**settings}
    arm = {"aggregate": sam.pop("arm")} if "arm" in sam else {}
    callbacks = [*([make()] if make else []), *([TaskSAM(**sam, **arm)] if settings else [])]
    if host == "taken over" and not callbacks:
        return
    fit(model, callbacks, labels(*batches))
    naive_fit(reference, labels(*batches), aggregate, **settings)
    assert_close(model, reference, 1e-9)


# Labelled samples only: losses, metrics and their means over an epoch.


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_losses_and_metrics_are_those_of_labelled_samples(verb: str) -> None:
    model = partly(optimizer=partial(torch.optim.SGD, lr=0.0))
    loader = labels(*MIXED)
    made = trainer()
    getattr(made, verb)(model, loader)
    stage = {"fit": "train", "validate": "val", "test": "test"}[verb]
    inputs, targets = loader.dataset.inputs, loader.dataset.targets
    with torch.no_grad():
        outputs = model(inputs)
    of_a, of_b = targets["a"] != -1, ~targets["b"].isnan().any(1)
    expected = {
        # All labelled samples count alike, however many of them a batch has.
        "a/loss": nn.functional.cross_entropy(outputs["a"][of_a], targets["a"][of_a]),
        "a/accuracy": (outputs["a"].argmax(1) == targets["a"])[of_a].double().mean(),
        "b/loss": nn.functional.mse_loss(outputs["b"][of_b], targets["b"][of_b]),
        "b/mse": nn.functional.mse_loss(outputs["b"][of_b], targets["b"][of_b]),
    }
    if verb == "fit":  # of steps, as always in training: the last batch
        last = labels(*MIXED).dataset
        keep_a, keep_b = of_a.clone(), of_b.clone()
        keep_a[:12] = keep_b[:12] = False
        a, b = last.targets["a"][keep_a], last.targets["b"][keep_b]
        expected["a/loss"] = nn.functional.cross_entropy(outputs["a"][keep_a], a)
        expected["b/loss"] = nn.functional.mse_loss(outputs["b"][keep_b], b)
    for name, value in expected.items():
        logged = made.callback_metrics[f"{stage}/{name}"].item()
        assert logged == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("split", [False, True])
def test_the_mean_of_an_epoch_weighs_labelled_samples(split: bool) -> None:
    """Also with validation data of every task by itself, and a batch without any label."""
    model = partly()
    loader = labels(([0, 1, 2], [1]), ([], [2]), (ALL, []), ([1], ALL))
    batches = list(loader)
    if split:
        loader = DataLoader(
            [{t: (x, y) for t, y in targets.items()} for x, targets in batches], batch_size=None
        )
    made = trainer()
    made.validate(model, loader, verbose=False)
    inputs = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        outputs = model(inputs)
    for task, criterion in (("a", nn.CrossEntropyLoss()), ("b", nn.MSELoss())):
        target = torch.cat([targets[task] for _, targets in batches])
        keep = target != -1 if task == "a" else ~target.isnan().any(1)
        expected = criterion(outputs[task][keep], target[keep]).item()
        assert made.callback_metrics[f"val/{task}/loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_row_with_one_nan_is_not_missing() -> None:
    """What is unknown within a sample is the loss's own affair."""
    task = Task("b", missing=NAN)
    target = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 3.0]])
    predictions = {"mean": torch.arange(6.0).view(3, 2), "scale": torch.ones(()), "name": "x"}
    found = task.labelled(predictions, target)
    assert found is not None
    kept, labelled = found
    assert kept["mean"].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert kept["scale"] == 1.0
    assert torch.equal(labelled, target[[0, 2]]) or labelled.isnan().sum() == 1
    assert labelled[1].tolist() == [2.0, 3.0]
    assert task.labelled(predictions, torch.full((3, 2), NAN)) is None
    full = torch.zeros(3, 2)
    assert task.labelled(predictions, full) == (predictions, full)


def test_missing_labels_of_pixels() -> None:
    """A sample all of whose pixels are -1 is left out; one with some is not."""
    task = Task("seg", missing=-1)
    target = torch.full((3, 2, 2), -1)
    target[1, 0, 0] = 2
    kept, labelled = task.labelled(torch.arange(3.0), target)
    assert kept.tolist() == [1.0]
    assert labelled.shape == (1, 2, 2)


def test_what_cannot_be_missing() -> None:
    for wrong in (True, "nan", [-1]):
        with says(TypeError, "`missing` must be a number such as -1 or nan", f"got {wrong!r}"):
            Task("a", missing=wrong)
    for target, got in ((torch.tensor(1), "a scalar"), ([1, 2], "list")):
        with says(TypeError, "`missing=-1`", f"got {got}", "`task_loss`"):
            Task("a", missing=-1).labelled(torch.zeros(2), target)


def test_missing_labels_are_no_part_of_the_graph() -> None:
    """A nan of an unlabelled sample reaches no gradient, also where the output is nan."""
    model = partly(optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(model, [CAGrad(), TaskSAM(0.05)], labels(*MIXED))
    assert values(model).isfinite().all()


# A batch without labels of a task, or of any.


class Looks(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        host = host_of(pl_module)
        present = None if host.last_step is None else tuple(host.last_step.losses)
        self.seen.append((present, trainer.global_step, values(pl_module)))


def without_label(kind: str) -> Any:
    def leave_out(losses):
        return losses

    def with_none(losses):
        return {task: losses.get(task) for task in ("a", "b")}

    class Theirs(ForeignPartly):
        absent = staticmethod(with_none if kind == "None" else leave_out)

        def nothing(self, losses):
            if kind == "step is None":
                return None
            return {"losses": {"a": None, "b": None} if kind == "None" else {}}

    return Theirs


METHODS = [[], [TaskSAM(0.05)], [CAGrad()], [CAGrad(), TaskSAM(0.05)], [UncertaintyWeighting()]]


@pytest.mark.parametrize("callbacks", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_any_label_is_skipped(
    callbacks: list[pl.Callback], accumulate: int
) -> None:
    looks = Looks()
    batches = [(ALL, []), ([], []), ([], ALL), ([0], [0]), ([], []), ([], [])]
    model = partly(accumulate_grad_batches=accumulate)
    done = fit(model, [*callbacks, looks], labels(*batches))
    present = [p for p, *_ in looks.seen]
    # An update may end with a batch that has nothing to add.
    ended = () if accumulate == 2 and callbacks else None
    assert present == [("a",), ended, ("b",), ("a", "b"), None, None]
    steps = [s for _, s, _ in looks.seen]
    assert steps == ([1, 1, 2, 3, 3, 3] if accumulate == 1 else [0, 1, 1, 2, 2, 2])
    for i in (1, 4, 5) if accumulate == 1 else (4, 5):
        assert torch.equal(looks.seen[i][2], looks.seen[i - 1][2])
    assert done.callback_metrics["train/skipped_batches"] == 3.0


@no_loss
@pytest.mark.parametrize("kind", ["left out", "None", "step is None"])
@pytest.mark.parametrize("callbacks", METHODS[1:])
def test_a_batch_without_any_label_of_an_ordinary_module(
    kind: str, callbacks: list[pl.Callback]
) -> None:
    batches = [(ALL, [1]), ([], []), ([], ALL), ([0], [0]), ([], [])]
    looks = Looks()
    ours, taken = partly(), without_label(kind)(partly())
    done = fit(taken, [*copy.deepcopy(callbacks), looks], labels(*batches))
    fit(ours, copy.deepcopy(callbacks), labels(*batches))
    assert [p for p, *_ in looks.seen] == [("a", "b"), None, ("b",), ("a", "b"), None]
    for i in (1, 4):
        assert torch.equal(looks.seen[i][2], looks.seen[i - 1][2])
    assert done.callback_metrics["train/skipped_batches"] == 2.0
    assert_close(taken, ours, 1e-10)


@pytest.mark.parametrize("callbacks", METHODS[1:])
def test_a_task_that_comes_later(callbacks: list[pl.Callback]) -> None:
    """Nothing shows that the trunk is shared, until the second task comes or the module says so."""

    class Declares(ForeignPartly):
        def shared_parameters(self):
            return self.encoder.parameters()

    batches = [(ALL, []), ([], ALL), ([0], [0])]
    ours, taken = partly(), Declares(partly())
    for model in (ours, taken):
        fit(model, copy.deepcopy(callbacks), labels(*batches))
    assert_close(taken, ours, 1e-10)


def test_no_batches_skipped_is_not_logged() -> None:
    done = fit(partly(), [CAGrad()], labels(*MIXED))
    assert "train/skipped_batches" not in done.callback_metrics


def test_a_task_that_never_has_a_label() -> None:
    with says(MisconfigurationException, "at least one batch of the epoch, got none with 'b'"):
        fit(partly(), [CAGrad()], labels((ALL, []), (ALL, [])))


# Methods with a state, while tasks come and go.

STATEFUL: dict[str, Callable[[], pl.Callback]] = {
    "GradNorm": lambda: GradNorm(lr=0.1),
    "UW": lambda: UncertaintyWeighting(lr=0.1),
    "DWA": DynamicWeightAverage,
    "FAMO": lambda: FAMO(lr=0.1),
    "GradVac": lambda: GradVac(beta=0.5),
    "DBMTL": lambda: DBMTL(beta=0.5),
}


@no_loss
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("sam", [[], [TaskSAM(0.05)]])
def test_states_while_a_task_is_absent(name: str, sam: list[pl.Callback]) -> None:
    """Both hosts agree, batches without any label among them."""
    ours, taken = partly(), ForeignPartly(partly())
    for model in (ours, taken):
        fit(model, [STATEFUL[name](), *sam], labels(*ABSENT, (ALL, ALL)), max_epochs=3)
    assert_close(taken, ours, 1e-10)
    assert values(ours).isfinite().all()


@pytest.mark.parametrize("name", ["GradNorm", "UW", "FAMO"])
def test_what_is_learned_of_an_absent_task_stays(name: str) -> None:
    class States(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = aggregator.state_dict()["scalars"]
            self.found.append({task: state[task]["value"] for task in ("a", "b") if task in state})

    aggregator, states = STATEFUL[name](), States()
    states.found = []
    fit(partly(), [aggregator, states], labels((ALL, ALL), (ALL, []), (ALL, []), (ALL, ALL)))
    first, second, third, last = states.found
    assert first["b"] != 0.0
    assert first["b"] == second["b"] == third["b"] != last["b"]


def test_the_mean_of_an_epoch_of_dwa_is_that_of_its_batches() -> None:
    aggregator = DynamicWeightAverage()
    model = partly(optimizer=partial(torch.optim.SGD, lr=0.0))
    batches = list(labels(*ABSENT))
    expected = {}
    for task in ("a", "b"):
        found = [naive_losses(model, batch).get(task) for batch in batches]
        at = {n: p.detach() for n, p in model.named_parameters()}
        terms = [f(at).item() for f in found if f is not None]
        expected[task] = sum(terms) / len(terms)
    fit(model, [aggregator], labels(*ABSENT))
    means = aggregator.state_dict()["means"]
    assert {t: m[-1] for t, m in means.items()} == pytest.approx(expected, rel=1e-12)


# A data set of its own for every task.


def sized(task: str, n: int, seed: int) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    y = torch.randn(n, 2, generator=g, dtype=torch.float64)
    target = torch.randint(0, 3, (n,), generator=g) if task == "a" else y
    return DataLoader(torch.utils.data.TensorDataset(x, target), batch_size=4)


def batches_of(mode: str) -> list[dict[str, Any]]:
    """What the mode means, written out: 6 batches of "a", 2 (of 4 and of 1) of "b"."""
    a, b = list(sized("a", 24, 0)), list(sized("b", 5, 1))
    if mode == "min_size":
        return [{"a": x, "b": y} for x, y in zip(a[:2], b, strict=True)]
    if mode == "max_size_cycle":
        return [{"a": x, "b": y} for x, y in zip(a, islice(cycle(b), 6), strict=True)]
    return [{"a": x, "b": y} for x, y in zip(a, [*b, *[(None, None)] * 4], strict=True)]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@pytest.mark.parametrize("name", ["none", "CAGrad", "PCGrad"])
@pytest.mark.parametrize("settings", [{}, {"rho": 0.05}, {"rho": 0.05, "point": "joint"}])
@pytest.mark.parametrize("host", ["module", "taken over"])
def test_a_data_set_for_every_task(mode: str, name: str, settings: Any, host: str) -> None:
    class Theirs(Foreign):
        def training_step(self, batch, batch_idx):
            losses = {}
            for task, pair in batch.items():
                if pair is not None:
                    output = self.heads[task](self.encoder(pair[0]))
                    losses[task] = self.criteria[task](output, pair[1])
            return {"loss": sum(losses.values()), "losses": losses}

    make, aggregate = NAIVE[name]
    model = partly()
    reference = copy.deepcopy(model)
    callbacks = [*([make()] if make else []), *([TaskSAM(**settings)] if settings else [])]
    if host == "taken over":
        model, callbacks = Theirs(model), callbacks or [TaskSAM(0.0)]
    loader = CombinedLoader({"a": sized("a", 24, 0), "b": sized("b", 5, 1)}, mode)
    done = fit(model, callbacks, loader, max_epochs=2)
    batches = batches_of(mode)
    assert done.global_step == 2 * len(batches)
    naive_fit(reference, batches * 2, aggregate, **settings)
    assert_close(model, reference, 1e-9)


def test_a_data_set_for_every_task_with_missing_labels() -> None:
    """Both at once: task "b" has no label in the second of its batches."""
    ours = partly()
    reference = copy.deepcopy(ours)
    batches = []
    for i, (x, targets) in enumerate(labels(*MIXED)):
        b = torch.full_like(targets["b"], NAN) if i == 1 else targets["b"]
        batches.append({"a": (x, targets["a"]), "b": (x + 1, b)})
    fit(ours, [PCGrad(), TaskSAM(0.05)], DataLoader(batches, batch_size=None))
    naive_fit(reference, batches, NAIVE["PCGrad"][1], rho=0.05)
    assert_close(ours, reference, 1e-9)


def test_sizes_of_batches_in_the_logs_of_data_sets_by_task() -> None:
    model = partly(optimizer=partial(torch.optim.SGD, lr=0.0))
    loaders = CombinedLoader({"a": sized("a", 24, 0), "b": sized("b", 5, 1)}, "max_size")
    made = trainer()
    made.validate(model, loaders, verbose=False)
    x, y = (torch.cat(t) for t in zip(*sized("b", 5, 1), strict=True))
    with torch.no_grad():
        expected = nn.functional.mse_loss(model(x)["b"], y).item()
    assert made.callback_metrics["val/b/loss"].item() == pytest.approx(expected, rel=1e-6)


def test_copies_of_a_task_keep_what_is_missing() -> None:
    twin = copy.deepcopy(partly())
    fit(twin, [CAGrad()], labels(*MIXED))
    again = partly()
    fit(again, [CAGrad()], labels(*MIXED))
    assert_identical(twin, again)
