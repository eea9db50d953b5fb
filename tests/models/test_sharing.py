"""Shared and own parts: the formulas, who owns what, Algorithm 1 on them, every aggregator."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad, LinearScalarization
from tests import naive
from tests.aggregators.specs import SPECS
from tests.helpers import Calls, assert_close, assert_identical, fit, sgd
from tests.models.sharing import SHARING, TASKS, inputs, items, loader, module

ARCHITECTURES = pytest.mark.parametrize("name", SHARING)
NOTHING_SHARED = ("soft l2", "soft trace")


@ARCHITECTURES
def test_the_formula(name: str) -> None:
    """Against loops over samples, tasks and experts."""
    net = module(name).encoder
    params, x = dict(net.named_parameters()), inputs()
    features = net(x)
    assert list(features) == list(TASKS)
    for task in TASKS:
        expected = torch.stack([SHARING[name].naive(params, task, row) for row in x])
        torch.testing.assert_close(features[task], expected, rtol=1e-12, atol=1e-13)
    assert "c" not in features
    with pytest.raises(KeyError, match="c"):
        features["c"]


@ARCHITECTURES
@pytest.mark.parametrize("sam", [None, {}, {"point": "joint"}])
def test_what_is_shared(name: str, sam: Any) -> None:
    made = module(name)
    fit(made, [CAGrad(), *([TaskSAM(0.05, **sam)] if sam is not None else [])], loader())
    params = dict(made.named_parameters())
    partition, values = made.engine.partition, list(params.values())

    def names(found: Any) -> set[str]:
        return {n for n, p in params.items() if any(p is q for q in found)}

    owners = {n: owner(name, n) for n in params}
    for task in TASKS:
        expected = {n for n, o in owners.items() if o == task}
        assert names(partition.head(task, values)) == expected
        assert any(n.startswith("encoder.") for n in expected)
    shared = {n for n, o in owners.items() if o is None}
    assert names(partition.shared(values)) == shared
    assert bool(shared) == (name not in NOTHING_SHARED)


def owner(name: str, parameter: str) -> str | None:
    kind, _, rest = parameter.partition(".")
    return rest.partition(".")[0] if kind == "heads" else SHARING[name].owner(rest)


@ARCHITECTURES
@pytest.mark.parametrize("settings", [{}, {"point": "joint"}, {"adaptive": True}, None], ids=str)
def test_it_is_trained_as_algorithm_1_says(name: str, settings: dict[str, Any] | None) -> None:
    """Three steps of CAGrad, plain and with TaskSAM, by hand on the naive forward."""
    ours = module(name)
    theirs = copy.deepcopy(ours)
    rho = {} if settings is None else {"rho": 0.05, **settings}
    fit(ours, [CAGrad(0.4), *([TaskSAM(**rho)] if rho else [])], loader())
    optimizer = sgd(theirs.parameters())
    params = dict(theirs.named_parameters())
    shared = [n for n in params if owner(name, n) is None]
    heads = {task: [n for n in params if owner(name, n) == task] for task in TASKS}
    direction = naive.cagrad(0.4) if shared else lambda rows, values: rows.sum(0)
    for batch in items():
        at = {n: p.detach().clone() for n, p in params.items()}
        losses = {task: loss_of(name, task, batch) for task in TASKS}
        grads = by_hand(losses, at, shared, heads, direction, **rho)
        extra = naive.gradient(lambda p: penalty(name, p), at, list(at))
        for n, p in params.items():
            p.grad = grads[n] + extra[n]
        optimizer.step()
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=n)


def by_hand(losses, at, shared, heads, direction, **rho):
    if shared:
        return naive.f_mtl_gradients(losses, at, shared, heads, direction, **rho)
    found = {}
    rest = {"rho": rho.get("rho", 0.0), "adaptive": rho.get("adaptive", False)}
    for task, loss in losses.items():  # each trunk by itself
        grads = naive.gradient(loss, at, heads[task])
        found.update(naive.gradient(loss, naive.perturb(at, grads, **rest), heads[task]))
    return found


def loss_of(name: str, task: str, batch: Any) -> Any:
    x, targets = batch

    def loss(params: dict[str, Tensor]) -> Tensor:
        encoder = {n.removeprefix("encoder."): p for n, p in params.items() if n[0] == "e"}
        features = torch.stack([SHARING[name].naive(encoder, task, row) for row in x])
        out = features @ params[f"heads.{task}.weight"].T + params[f"heads.{task}.bias"]
        if task == "b":
            return ((out - targets["b"]) ** 2).mean()
        chosen = torch.stack([row[y] for row, y in zip(out, targets["a"], strict=True)])
        return (torch.log(torch.exp(out).sum(1)) - chosen).mean()

    return loss


def penalty(name: str, params: dict[str, Tensor]) -> Tensor:
    total = sum(0.0 * p.sum() for p in params.values())
    if name not in NOTHING_SHARED:
        return total
    for layer in ("0.weight", "0.bias"):
        a, b = (params[f"encoder.trunks.{task}.{layer}"].flatten() for task in TASKS)
        if name == "soft l2":
            total = total + 0.1 * ((a - b) ** 2).sum() / 2
        else:  # of a matrix with two rows: the sum of the singular values, squared, by the traces
            squares = a @ a + b @ b
            determinant = (a @ a) * (b @ b) - (a @ b) ** 2
            total = total + 0.1 * torch.sqrt(squares + 2 * torch.sqrt(determinant))
    return total


# The variants of a class on two of the architectures, the classes on all.
STEPS = [(n, s) for n in SHARING for s in SPECS if "-" not in s or n in {"MMoE", "soft l2"}]


@pytest.mark.filterwarnings("ignore:The direction of .* does not scale with the gradients")
@pytest.mark.parametrize(("name", "spec"), STEPS)
def test_every_aggregator_takes_a_step(name: str, spec: str) -> None:
    for sam in ([], [TaskSAM(0.05)]):
        made = module(name)
        before = copy.deepcopy(made)
        fit(made, [SPECS[spec].make(), *sam], loader(2))
        for (n, p), q in zip(made.named_parameters(), before.parameters(), strict=True):
            assert torch.isfinite(p).all(), n
            assert not torch.equal(p, q), n


@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize("name", NOTHING_SHARED)
def test_with_nothing_shared_each_trunk_is_trained_by_itself(name: str, sam: bool) -> None:
    """The aggregator of gradients has no say; with the penalty each is plain (flat) training."""
    found, expected = module(name), module(name)
    flat = [TaskSAM(0.05)] if sam else []
    fit(found, [CAGrad(0.4), *flat], loader())
    fit(expected, flat, loader())
    assert_close(found, expected, 1e-12)


@ARCHITECTURES
@pytest.mark.parametrize("flat", [False, True])
def test_resumed_it_goes_on_bit_for_bit(name: str, flat: bool, tmp_path: Any) -> None:
    def callbacks() -> list[Any]:
        return [CAGrad(), *([TaskSAM(0.05)] if flat else [])]

    whole, first, second = module(name), module(name), module(name)
    fit(whole, callbacks(), loader(), max_epochs=2)
    fit(first, callbacks(), loader()).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, callbacks(), loader(), max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert_identical(second, whole)


def test_what_is_shared_runs_once_for_all_tasks() -> None:
    """Per batch: once for all, then once for each task; a gate in its task's passes alone."""
    made = module("MMoE")
    expert, gate = Calls(made.encoder.experts[0]), Calls(made.encoder.gates["a"])
    fit(made, [CAGrad(), TaskSAM(0.05)], loader(1))
    assert (expert.count, gate.count) == (1 + 2, 1 + 2)


@pytest.mark.parametrize("name", ["CGC", "soft l2"])
def test_a_task_that_is_not_in_a_batch_rests(name: str) -> None:
    before, after, batches = module(name), module(name), items(2)
    for made in (before, after):
        made.encoder.weight = 0.0  # the penalty would draw at what rests
    del batches[1][1]["b"]
    for made, given in ((before, batches[:1]), (after, batches)):
        fit(made, [CAGrad(), TaskSAM(0.05)], DataLoader(given, batch_size=None))
    for (n, p), q in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (owner(name, n) == "b"), n


class Mean(LinearScalarization):
    """The plain sum by way of the gradients."""

    needs_gradients = True


@ARCHITECTURES
def test_at_the_features_a_linear_aggregator_is_the_plain_sum(name: str) -> None:
    """Of features that depend on each other, as a stem's and the experts', none counts twice."""
    found, expected = module(name, gradients="features"), module(name)
    fit(found, [Mean()], loader())
    fit(expected, [], loader())
    assert_close(found, expected, 1e-12)


@ARCHITECTURES
def test_without_the_matrix_it_is_the_same(name: str) -> None:
    found, expected = module(name, gradients="gram"), module(name)
    for made in (found, expected):
        fit(made, [CAGrad(0.4)], loader())
    assert_close(found, expected, 1e-9)


class Held(MultiTaskModule):
    """Soft sharing with the penalty in the losses, as the docs show it."""

    def task_loss(self, task, features, batch):
        return super().task_loss(task, features, batch) + self.encoder.penalty() / len(self.tasks)

    def penalty(self, batch, batch_idx):
        return None


def test_with_the_penalty_in_the_losses_all_trunks_are_shared() -> None:
    plain = module("soft l2")
    made = Held(plain.encoder, plain.tasks, sgd).double()
    fit(made, [CAGrad(), TaskSAM(0.05)], loader())
    params = dict(made.named_parameters())
    shared = made.engine.partition.shared(list(params.values()))
    found = {n for n, p in params.items() if any(p is q for q in shared)}
    assert found == {n for n in params if n.startswith("encoder.trunks.")}


def test_the_penalty_is_logged() -> None:
    done = fit(module("soft l2"), [CAGrad()], loader())
    assert float(done.callback_metrics["train/penalty"]) > 0


class Taken(LightningModule):
    """An ordinary module that knows nothing of the package, with soft sharing."""

    def __init__(self) -> None:
        super().__init__()
        made = module("soft l2")
        self.encoder, self.heads = made.encoder, made.heads

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, targets = batch
        features = self.encoder(x)
        out = {task: head(features[task]) for task, head in self.heads.items()}
        losses = {
            "a": nn.functional.cross_entropy(out["a"], targets["a"]),
            "b": nn.functional.mse_loss(out["b"], targets["b"]),
        }
        penalty = self.encoder.penalty()
        return {"loss": sum(losses.values()) + penalty, "losses": losses, "penalty": penalty}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("flat", [False, True])
def test_taken_over_it_is_the_same(flat: bool) -> None:
    ours, theirs = module("soft l2"), Taken()
    for made in (ours, theirs):
        fit(made, [CAGrad(), *([TaskSAM(0.05)] if flat else [])], loader())
    found = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(found[name], p, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@ARCHITECTURES
def test_compiled_it_is_the_same(name: str) -> None:
    net = module(name).encoder
    compiled = torch.compile(net, backend="eager")
    for task in TASKS:
        torch.testing.assert_close(compiled(inputs())[task], net(inputs())[task])
