"""What is shared and what belongs to a head, in all the ways of writing a model."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import MGDA, CAGrad
from tests import naive
from tests.helpers import (
    Calls,
    assert_close,
    assert_identical,
    data,
    fit,
    module,
    sgd,
    trainer,
)

DOUBLE = {"dtype": torch.float64}


def names(model: MultiTaskModule) -> dict[str, set[str]]:
    """The names of the shared parameters and of every task's own, after a fit."""
    partition = model.engine.partition
    named = dict(model.named_parameters())
    trainable = [p for p in named.values() if p.requires_grad]
    found = {"shared": partition.shared(trainable)}
    found |= {task.name: partition.head(task.name, trainable) for task in model.tasks}
    by_identity = {id(p): name for name, p in named.items()}
    return {part: {by_identity[id(p)] for p in params} for part, params in found.items()}


def under(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


class OwnParts(MultiTaskModule):
    """``encode`` and ``task_loss`` overridden; heads are attributes of the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=[Task("a"), Task("b")], optimizer=sgd, **kwargs)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
        self.outs = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 2)})

    def encode(self, batch):
        return self.trunk(batch[0])

    def task_loss(self, task, features, batch):
        criterion = nn.functional.cross_entropy if task == "a" else nn.functional.mse_loss
        return criterion(self.outs[task.name](features), batch[1][task])


class PenalisedTrunks(MultiTaskModule):
    """As in MTAN: every task has an attention of its own on all levels of a shared trunk."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=[Task("a"), Task("b")], optimizer=sgd, **kwargs)
        self.levels = nn.ModuleList([nn.Linear(36, 6), nn.Linear(6, 6)])
        self.attention = nn.ModuleDict(
            {t: nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for t in "ab"}
        )
        self.outs = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 2)})

    def losses(self, batch, batch_idx):
        inputs, targets = batch
        levels = [torch.tanh(self.levels[0](inputs.flatten(1)))]
        levels.append(torch.tanh(self.levels[1](levels[0])))
        criteria = {"a": nn.functional.cross_entropy, "b": nn.functional.mse_loss}
        found = {}
        for task in "ab":
            pairs = zip(self.attention[task], levels, strict=True)
            seen = sum(torch.sigmoid(attend(level)) * level for attend, level in pairs)
            found[task] = criteria[task](self.outs[task](seen), targets[task])
        return found


class Subsets(MultiTaskModule):
    """Three tasks, of which two share a middle layer; biases tied; one layer frozen."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=[Task(t) for t in "abc"], optimizer=sgd, **kwargs)
        self.trunk = nn.Linear(36, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.middle = nn.Linear(5, 5)
        self.outs = nn.ModuleDict({t: nn.Linear(5, 2) for t in "abc"})
        self.outs["c"].bias = self.outs["b"].bias

    def losses(self, batch, batch_idx):
        inputs, targets = batch
        features = self.frozen(self.trunk(inputs.flatten(1)))
        deep = self.middle(features)
        through = {"a": deep, "b": deep, "c": features}
        return {
            t: nn.functional.mse_loss(self.outs[t](through[t]), targets[t].to(inputs.dtype))
            for t in targets
        }


def make(kind: type, **kwargs: Any) -> Any:
    torch.manual_seed(9)
    return kind(**kwargs).double()


def abc(n: int = 24) -> DataLoader:
    loader = data(n)
    loader.dataset.targets = {
        t: torch.randn(n, 2, generator=torch.Generator().manual_seed(i), **DOUBLE)
        for i, t in enumerate("abc")
    }
    return loader


def test_composed() -> None:
    ours = module()
    fit(ours, [CAGrad(), TaskSAM()])
    assert names(ours) == {
        "shared": under(ours, "encoder."),
        "a": under(ours, "heads.a."),
        "b": under(ours, "heads.b."),
    }


def test_encode_and_task_loss_overridden() -> None:
    ours = make(OwnParts)
    fit(ours, [CAGrad(), TaskSAM()])
    assert names(ours) == {
        "shared": under(ours, "trunk."),
        "a": under(ours, "outs.a."),
        "b": under(ours, "outs.b."),
    }


def test_soft_sharing() -> None:
    ours = make(PenalisedTrunks)
    fit(ours, [CAGrad(), TaskSAM()])
    assert names(ours) == {
        "shared": under(ours, "levels."),
        "a": under(ours, "attention.a.", "outs.a."),
        "b": under(ours, "attention.b.", "outs.b."),
    }


def test_subsets_frozen_and_tied() -> None:
    ours = make(Subsets)
    fit(ours, [CAGrad(), TaskSAM()], abc())
    assert names(ours) == {
        "shared": under(ours, "trunk.", "middle.") | {"outs.b.bias"},
        "a": under(ours, "outs.a."),
        "b": {"outs.b.weight"},
        "c": {"outs.c.weight"},
    }


def loss_functions(
    model: MultiTaskModule, batch: Any
) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """Every task's loss as a function of the parameters."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, task: str) -> Tensor:
            return self.model.losses(batch, 0)[task]

    net = Net()

    def loss_of(task: str):
        def loss(params: dict[str, Tensor]) -> Tensor:
            state = {f"model.{k}": v for k, v in params.items()}
            state |= {k: v.clone() for k, v in net.named_buffers()}
            return functional_call(net, state, (task,))

        return loss

    return {task: loss_of(task) for task in model.losses(batch, 0)}


def naive_fit(
    model: MultiTaskModule,
    batches: Iterable[Any],
    parts: dict[str, set[str]],
    aggregate: Any,
    **settings: Any,
) -> None:
    """Train by hand, with the partition ``parts``."""
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    order = [name for name in named if name in parts["shared"]]
    for batch in batches:
        losses = loss_functions(model, batch)
        heads = {task: [name for name in named if name in parts[task]] for task in losses}
        values = {name: p.detach().clone() for name, p in named.items()}
        grads = naive.f_mtl_gradients(losses, values, order, heads, aggregate, **settings)
        for name, p in named.items():
            p.grad = grads.get(name)
        optimizer.step()


@pytest.mark.parametrize("point", ["separate", "joint"])
@pytest.mark.parametrize("kind", [OwnParts, PenalisedTrunks])
def test_exact(kind: type, point: str) -> None:
    ours = make(kind)
    reference = copy.deepcopy(ours)
    fit(ours, [CAGrad(0.4), TaskSAM(0.2, point=point)])
    naive_fit(reference, data(), names(ours), naive.cagrad(0.4), rho=0.2, point=point)
    assert_close(ours, reference, 1e-10)


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_exact_with_subsets(point: str) -> None:
    ours = make(Subsets)
    reference = copy.deepcopy(ours)
    fit(ours, [MGDA(), TaskSAM(0.2, point=point)], abc())
    naive_fit(reference, abc(), names(ours), naive.mgda, rho=0.2, point=point)
    assert_close(ours, reference, 1e-9)


class Declares(OwnParts):
    """Counts the last layer of the trunk to task "a"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trunk.append(nn.Linear(5, 5))

    def shared_parameters(self):
        return self.trunk[1].parameters()

    def task_parameters(self, task):
        return self.trunk[3].parameters() if task == "a" else None


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_declared(point: str) -> None:
    """A declared head parameter follows its own task only, as Algorithm 1 says of heads."""
    ours = make(Declares)
    reference = copy.deepcopy(ours)
    fit(ours, [CAGrad(0.4), TaskSAM(0.2, point=point)])
    parts = {
        "shared": under(ours, "trunk.1."),
        "a": under(ours, "trunk.3.", "outs.a."),
        "b": under(ours, "outs.b."),
    }
    assert names(ours) == parts
    naive_fit(reference, data(), parts, naive.cagrad(0.4), rho=0.2, point=point)
    assert_close(ours, reference, 1e-10)


class DeclaresTwice(Declares):
    def task_parameters(self, task):
        return self.trunk[1].parameters() if task == "a" else None


def test_declared_twice() -> None:
    with pytest.raises(ValueError, match=r"declared for the shared part and for task 'a'"):
        fit(make(DeclaresTwice), [CAGrad()])


class Branching(nn.Module):
    """An encoder with a branch for every task: its parameters belong to the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh())
        self.branches = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: torch.tanh(branch(features)) for task, branch in self.branches.items()}


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_branches_in_the_encoder(point: str) -> None:
    """The heads' second gradient must not be taken on cached features here."""
    torch.manual_seed(2)
    ours = module(trunk=Branching())
    reference = copy.deepcopy(ours)
    calls = Calls(ours.encoder)
    fit(ours, [CAGrad(0.4), TaskSAM(0.5, point=point)])
    assert calls.count == 3 * (1 + 2 * (2 if point == "separate" else 1))
    assert names(ours) == {
        "shared": under(ours, "encoder.trunk."),
        "a": under(ours, "encoder.branches.a.", "heads.a."),
        "b": under(ours, "encoder.branches.b.", "heads.b."),
    }
    naive_fit(reference, data(), names(ours), naive.cagrad(0.4), rho=0.5, point=point)
    assert_close(ours, reference, 1e-10)


# Tasks that are absent.


def alternating(first: str = "ab") -> list[Any]:
    """Batches with a part of the targets each; the first one has those of ``first``."""
    batches = [copy.deepcopy(batch) for batch in data(40)]
    for (_, targets), present in zip(batches, [first, "b", "ab", "a", "ab"], strict=True):
        for task in set(targets) - set(present):
            targets[task] = None
    return batches


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def as_loader(batches: list[Any]) -> DataLoader:
    return DataLoader(Batches(batches), batch_size=None)


def dropped(batches: list[Any]) -> list[Any]:
    """The same with the absent targets left out."""
    return [(x, {k: v for k, v in y.items() if v is not None}) for x, y in batches]


@pytest.mark.parametrize("callbacks", [[], [CAGrad(), TaskSAM(0.2)]])
def test_none_and_missing_are_the_same(callbacks: list) -> None:
    first, second = module(), module()
    done = fit(first, callbacks, as_loader(alternating()))
    fit(second, callbacks, as_loader(dropped(alternating())))
    assert done.global_step == 5
    assert_identical(first, second)


@pytest.mark.parametrize("point", ["separate", "joint"])
def test_exact_with_absent_tasks(point: str) -> None:
    ours = module()
    reference = copy.deepcopy(ours)
    fit(ours, [CAGrad(0.4), TaskSAM(0.2, point=point)], as_loader(alternating()))

    def aggregate(rows: Tensor, losses: Tensor) -> Tensor:
        if len(rows) == 2:
            return naive.cagrad(0.4)(rows, losses)
        return rows[0] * (1 + 0.4) / (1 + 0.4**2)  # CAGrad of one gradient

    naive_fit(reference, dropped(alternating()), names(ours), aggregate, rho=0.2, point=point)
    assert_close(ours, reference, 1e-10)


def test_a_task_absent_from_the_first_batches() -> None:
    """The encoder of all tasks is shared from the first batch on, whichever tasks it has."""
    ours = module()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(names(pl_module))

    fit(ours, [CAGrad(), TaskSAM(), Watch()], as_loader(dropped(alternating("a"))))
    for found in seen:  # batch 0 and batch 3 have "a" alone, batch 1 has "b" alone
        assert found["shared"] == under(ours, "encoder.")
    assert seen[0]["a"] == under(ours, "heads.a.")


@pytest.mark.filterwarnings("ignore:No batch so far had targets")
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_a_first_batch_with_one_task_is_treated_as_one_later_on_is(point: str) -> None:
    (x, targets), *_ = list(data())
    found, declared = module(), module()
    declared.shared_parameters = declared.encoder.parameters
    for model in (found, declared):
        sam = TaskSAM(0.2, rho_heads=0.05, point=point)
        fit(
            model, [CAGrad(), sam], as_loader([(x, {"a": targets["a"]}), (x, targets)]), max_steps=1
        )
    assert_identical(found, declared)


def test_a_compiled_net_with_several_outputs_asks_for_a_declaration() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.trunk(x))
            return self.a(h), self.b(h)

    class Compiled(MultiTaskModule):
        declared = False

        def __init__(self) -> None:
            super().__init__(tasks=[Task("a"), Task("b")], optimizer=sgd)
            torch.manual_seed(0)
            self.net = Net()

        def losses(self, batch, batch_idx):
            p, q = self.net(batch[0])
            return {"a": p.square().mean(), "b": q.exp().mean()}

        def shared_parameters(self):
            return self.net.trunk.parameters() if self.declared else None

        def task_parameters(self, task):
            return getattr(self.net, task.name).parameters() if self.declared else None

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    loader = as_loader([(x, {"a": x, "b": x})])
    compiled = Compiled()
    compiled.net.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="compiled module with several outputs does not show"):
        fit(compiled, [CAGrad()], loader)
    declared, plain = Compiled(), Compiled()
    declared.declared = True
    declared.net.compile(backend="aot_eager")
    for model in (declared, plain):
        fit(model, [CAGrad(), TaskSAM(0.1)], loader)
    for p, q in zip(declared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    fit(compiled, [], loader)  # the plain sum needs no partition


@pytest.mark.parametrize("callbacks", [[], [CAGrad(), TaskSAM(0.2)]])
def test_batches_without_any_target_are_left_out(callbacks: list) -> None:
    batches = dropped(alternating())
    empty = (batches[0][0], {})
    first, second = module(), module()
    with_gap = fit(first, callbacks, as_loader([batches[0], empty, *batches[1:]]))
    fit(second, callbacks, as_loader(batches))
    assert with_gap.global_step == 5
    assert_identical(first.heads, second.heads)
    assert_identical(first.encoder, second.encoder)


# One data set per task.


def separate_loaders(sizes: dict[str, int]) -> dict[str, DataLoader]:
    generator = torch.Generator().manual_seed(0)
    loaders = {}
    for task, n in sizes.items():
        x = torch.randn(n, 1, 6, 6, generator=generator, **DOUBLE)
        y = torch.randn(n, 2, generator=generator, **DOUBLE)
        y = torch.randint(0, 3, (n,), generator=generator) if task == "a" else y
        items = list(zip(x, y, strict=True))
        loaders[task] = DataLoader(items, batch_size=8)
    return loaders


class PerTask(MultiTaskModule):
    """Losses of ``{task: (inputs, target)}`` by hand."""

    def losses(self, batch, batch_idx):
        found = {}
        for task in self.tasks:
            if batch.get(task.name) is not None:
                inputs, target = batch[task.name]
                found[task.name] = task.loss(self.heads[task.name](self.encoder(inputs)), target)
        return found


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_a_data_set_per_task(mode: str, point: str) -> None:
    loaders = {"a": 24, "b": 36}
    ours, by_hand = module(), module(kind=PerTask)
    calls = Calls(ours.encoder)
    for model in (ours, by_hand):
        combined = CombinedLoader(separate_loaders(loaders), mode)
        done = fit(model, [CAGrad(), TaskSAM(0.2, point=point)], combined)
    steps = 3 if mode == "min_size" else 5
    assert done.global_step == steps
    assert_close(ours, by_hand, 1e-12)
    alone = 2 if mode == "max_size" else 0
    assert calls.count == (steps - alone) * (2 + 2) + alone * (1 + 1)
    assert names(ours)["shared"] == under(ours, "encoder.")


def test_losses_of_a_data_set_per_task_are_weighed_by_their_own_sizes() -> None:
    """Twelve samples of "b" in batches of 8 and 4, twenty-four of "a" in batches of 8."""
    ours = module()
    ours.eval()
    loaders = separate_loaders({"a": 24, "b": 12})
    with torch.no_grad():
        expected = {}
        for task, loader in loaders.items():
            items = [loader.dataset[i] for i in range(len(loader.dataset))]
            x, y = (torch.stack(part) for part in zip(*items, strict=True))
            expected[task] = ours.tasks["ab".index(task)].loss(ours(x)[task], y).item()
    combined = CombinedLoader(loaders, "max_size")
    (measured,) = trainer().validate(ours, combined, verbose=False)
    assert measured["val/a/loss"] == pytest.approx(expected["a"], rel=1e-12)
    assert measured["val/b/loss"] == pytest.approx(expected["b"], rel=1e-12)


# One task.


def single(kind: type = MultiTaskModule) -> Any:
    torch.manual_seed(4)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh())
    task = Task("a", head=nn.Linear(5, 3), loss=nn.CrossEntropyLoss())
    return kind(trunk, [task], optimizer=sgd).double()


def plain_sam(model: Any, rho: float) -> None:
    """SAM as its authors wrote it: one perturbation of all parameters together."""
    optimizer = sgd(model.parameters())
    params = list(model.parameters())
    model.train()
    for inputs, targets in data():
        state = {k: v.clone() for k, v in model.state_dict().items()}

        def loss(inputs=inputs, targets=targets) -> Tensor:
            return nn.functional.cross_entropy(model(inputs)["a"], targets["a"])

        grads = torch.autograd.grad(loss(), params)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.add_(rho * g / norm)
        grads = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state[name])
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("point", ["separate", "joint"])
@pytest.mark.parametrize("aggregator", [None, MGDA])
def test_one_task_is_plain_sam(point: str, aggregator) -> None:
    ours, reference = single(), single()
    fit(ours, [TaskSAM(0.2, point=point), *([aggregator()] if aggregator else [])])
    assert names(ours)["shared"] == set()  # nobody to share with
    plain_sam(reference, 0.2)
    assert_close(ours, reference, 1e-12)


class SingleShared(MultiTaskModule):
    def shared_parameters(self):
        return self.encoder.parameters()


def test_one_task_with_a_declared_trunk() -> None:
    """Then trunk and head are perturbed by themselves, and the trunk's row is aggregated."""
    ours = single(SingleShared)
    reference = copy.deepcopy(ours)
    fit(ours, [MGDA(), TaskSAM(0.2)])
    parts = {"shared": under(ours, "encoder."), "a": under(ours, "heads.a.")}
    assert names(ours) == parts
    batches = [(x, {"a": y["a"]}) for x, y in data()]
    naive_fit(reference, batches, parts, naive.mgda, rho=0.2)
    assert_close(ours, reference, 1e-10)


def test_unfreezing_in_mid_fit() -> None:
    """What becomes trainable later is found, and what is frozen is left alone."""

    class Unfreezes(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.encoder[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.encoder[0].requires_grad_(True)

    ours = module(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    fit(ours, [CAGrad(), TaskSAM(), Unfreezes()], max_epochs=2)
    assert names(ours)["shared"] == under(ours, "encoder.")
