"""Models as they are met: frozen parts, adapters, tied weights, sequences, several outputs."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import MGDA, PCGrad
from tests import naive
from tests.helpers import Pairs, fit, sgd
from tests.hosts import Foreign
from tests.test_bad_input import says

Losses = dict[str, Tensor]


class Net(nn.Module):
    """Maps a batch to its losses; the parameters that one task alone has are named by it."""

    only: ClassVar[Mapping[str, tuple[str, ...]]] = {"a": ("a.",), "b": ("b.",)}

    def forward(self, batch: Any) -> Losses:
        raise NotImplementedError


class Ours(MultiTaskModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(optimizer=sgd)
        self.net = net

    def losses(self, batch, batch_idx):
        return self.net(batch)


class Theirs(Foreign):
    def __init__(self, net: nn.Module) -> None:
        super(Foreign, self).__init__()
        self.net = net
        self._make_optimizer = sgd

    def training_step(self, batch, batch_idx):
        losses = self.net(batch)
        return {"loss": sum(losses.values()), "losses": losses}


HOSTS = {"module": Ours, "taken over": Theirs}
SAMS = [{}, {"rho": 0.05}, {"rho": 0.5, "adaptive": True, "point": "joint"}]
both_hosts = pytest.mark.parametrize("host", HOSTS)
all_sams = pytest.mark.parametrize("settings", SAMS, ids=["plain", "separate", "adaptive joint"])


def batches(inputs: Tensor) -> DataLoader:
    """Two batches of four."""
    g = torch.Generator().manual_seed(1)
    targets = {
        "a": torch.randint(0, 3, (8,), generator=g),
        "b": torch.randn(8, 2, generator=g, dtype=torch.float64),
    }
    return DataLoader(Pairs(inputs, targets), batch_size=4)


def vectors(*shape: int) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return batches(torch.randn(8, *shape, generator=g, dtype=torch.float64))


def words(length: int = 5) -> DataLoader:
    return batches(torch.randint(0, 7, (8, length), generator=torch.Generator().manual_seed(0)))


def naive_fit(
    net: nn.Module,
    only: Mapping[str, Iterable[str]],
    loader: DataLoader,
    aggregate: Any,
    **settings: Any,
) -> None:
    """Train by hand; parameters whose name begins with one of ``only[task]`` are that task's."""
    names = {n: p for n, p in net.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in net.named_parameters() if not p.requires_grad}
    heads = {t: [n for n in names if n.startswith(tuple(starts))] for t, starts in only.items()}
    shared = [n for n in names if not any(n in head for head in heads.values())]
    optimizer = sgd(net.parameters())
    for batch in loader:

        def loss_of(task: str, batch: Any = batch) -> Callable[[naive.Params], Tensor]:
            return lambda params: functional_call(net, {**frozen, **params}, (batch,))[task]

        at = {n: p.detach().clone() for n, p in names.items()}
        losses = {task: loss_of(task) for task in only}
        grads = naive.f_mtl_gradients(losses, at, shared, heads, aggregate, **settings)
        for n, p in names.items():
            p.grad = grads[n]
        optimizer.step()


def check(
    host: str,
    net: nn.Module,
    loader: DataLoader,
    settings: dict[str, Any],
    method: tuple[Any, Any] = (PCGrad, naive.pcgrad),
    only: Mapping[str, Iterable[str]] | None = None,
) -> Any:
    """Two steps through a Trainer equal two naive ones; returns the trained module."""
    net = net.double()
    reference = copy.deepcopy(net)
    make, aggregate = method
    model = HOSTS[host](net)
    fit(model, [make(), *([TaskSAM(**settings)] if settings else [])], loader)
    owned = only if only is not None else net.only
    naive_fit(reference, owned, loader, aggregate, **settings)
    assert_same(net, reference)
    return model


def assert_same(net: nn.Module, reference: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        scale = max(q.norm().item(), 1e-3)
        assert (p - q).norm().item() < 1e-9 * scale, name


def classified(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1]["a"])


def regressed(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.mse_loss(output, batch[1]["b"])


# Frozen parameters.


class Layered(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        self.a = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.b = nn.Linear(4, 2)

    def forward(self, batch):
        features = self.trunk(batch[0])
        return {"a": classified(self.a(features), batch), "b": regressed(self.b(features), batch)}


@both_hosts
@all_sams
@pytest.mark.parametrize("frozen", ["trunk.0", "trunk.2.bias", "a.0", "trunk"])
def test_frozen_parameters_never_move(host: str, settings: dict[str, Any], frozen: str) -> None:
    net = Layered().double()
    still = {n: p.requires_grad_(False) for n, p in net.named_parameters() if n.startswith(frozen)}
    before = {n: p.clone() for n, p in still.items()}
    moving = [n for n, p in net.named_parameters() if p.requires_grad]
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    if frozen == "trunk":  # nothing is shared, and the flat parts with it
        model = HOSTS[host](net)
        reference = copy.deepcopy(net)
        fit(model, [PCGrad(), *([TaskSAM(**settings)] if settings else [])], vectors(6))
        train_heads(reference, settings)
        assert_same(net, reference)
    else:
        check(host, net, vectors(6), settings)
    assert still
    for name, p in still.items():
        assert torch.equal(p, before[name]), name
        assert p.grad is None
    assert all(not torch.equal(net.get_parameter(n), start[n]) for n in moving)


def train_heads(net: nn.Module, settings: dict[str, Any]) -> None:
    optimizer = sgd(net.parameters())
    rho, adaptive = settings.get("rho", 0.0), settings.get("adaptive", False)
    frozen = {n: p.detach() for n, p in net.named_parameters() if not p.requires_grad}
    for batch in vectors(6):
        at = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
        for task in ("a", "b"):
            names = [n for n in at if n.startswith(f"{task}.")]

            def loss(params: naive.Params, task: str = task, batch: Any = batch) -> Tensor:
                return functional_call(net, {**frozen, **params}, (batch,))[task]

            moved = naive.perturb(at, naive.gradient(loss, at, names), rho, adaptive)
            for n, g in naive.gradient(loss, moved, names).items():
                net.get_parameter(n).grad = g
        optimizer.step()


@both_hosts
def test_thawing_in_mid_fit(host: str) -> None:
    """A parameter that is trained from the second batch on is shared from then on."""

    net = Layered().double()
    net.trunk[0].requires_grad_(False)
    reference = copy.deepcopy(net)
    model = HOSTS[host](net)
    loader = list(vectors(6))

    class Thaws(type(model)):
        def on_train_batch_start(self, batch, batch_idx):
            self.net.trunk[0].requires_grad_(batch_idx == 1)

    model.__class__ = Thaws
    model.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.1)
    fit(model, [PCGrad(), TaskSAM(0.05)], DataLoader(loader, batch_size=None))
    for i, batch in enumerate(loader):
        reference.trunk[0].requires_grad_(i == 1)
        plain_step(reference, batch)
    assert_same(net, reference)


def plain_step(net: Any, batch: Any) -> None:
    names = {n: p for n, p in net.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in net.named_parameters() if not p.requires_grad}
    heads = {t: [n for n in names if n.startswith(f"{t}.")] for t in ("a", "b")}
    shared = [n for n in names if n.startswith("trunk.")]

    def loss_of(task: str) -> Callable[[naive.Params], Tensor]:
        return lambda params: functional_call(net, {**frozen, **params}, (batch,))[task]

    at = {n: p.detach().clone() for n, p in names.items()}
    losses = {t: loss_of(t) for t in ("a", "b")}
    grads = naive.f_mtl_gradients(losses, at, shared, heads, naive.pcgrad, rho=0.05)
    with torch.no_grad():
        for n, p in names.items():
            p.sub_(grads[n], alpha=0.1)


# Adapters of low rank.


class LowRank(nn.Module):
    """A frozen linear layer and a trained difference of rank 2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 3)
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Adapted(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[0], self.trunk[2] = LowRank(self.trunk[0]), LowRank(self.trunk[2])


@both_hosts
@all_sams
def test_adapters_of_low_rank(host: str, settings: dict[str, Any]) -> None:
    """While ``up`` is zero, the gradient of ``down`` is too."""
    net = Adapted()
    before = net.trunk[0].base.weight.clone().double()
    check(host, net, vectors(6), settings)
    assert torch.equal(net.trunk[0].base.weight, before)
    assert net.trunk[0].base.weight.grad is None
    assert net.trunk[0].up.abs().max() > 0


@both_hosts
@all_sams
def test_adapters_of_peft(host: str, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["trunk.0", "trunk.2"], modules_to_save=["a", "b"], lora_dropout=0.0
    )
    net = peft.get_peft_model(Layered(), config).double()
    only: ClassVar = {t: (f"base_model.model.{t}.modules_to_save",) for t in ("a", "b")}
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert any("lora_A" in n for n in trained)
    assert any("modules_to_save" in n for n in trained)
    check(host, net, vectors(6), settings, only=only)
    for name, value in frozen.items():
        assert torch.equal(net.get_parameter(name), value), name
        assert net.get_parameter(name).grad is None


# Weights used in several places.


class Tied(Net):
    """The head of "a" is the embedding, turned round."""

    only: ClassVar = {"a": (), "b": ("b.",)}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.a = nn.Linear(4, 7, bias=False)
        self.a.weight = self.embedding.weight
        self.b = nn.Linear(4, 2)

    def forward(self, batch):
        features = self.mix(self.embedding(batch[0])).tanh()
        words = nn.functional.cross_entropy(self.a(features).flatten(0, 1), batch[0].flatten())
        return {"a": words, "b": regressed(self.b(features.mean(1)), batch)}


@both_hosts
@all_sams
def test_tied_weights(host: str, settings: dict[str, Any]) -> None:
    net = Tied()
    check(host, net, words(), settings)
    assert net.a.weight is net.embedding.weight
    assert len(list(net.parameters())) == 5


class TiedHeads(Net):
    """The two heads have one layer in common, which the trunk has not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.tie = nn.Linear(6, 4), nn.Linear(4, 4)
        self.a = nn.Sequential(nn.Linear(4, 3))
        self.b = nn.Sequential(nn.Linear(4, 2))

    def forward(self, batch):
        features = self.trunk(batch[0]).tanh()
        a, b = self.a(self.tie(features)), self.b(self.tie(features.square()).tanh())
        return {"a": classified(a, batch), "b": regressed(b, batch)}


@both_hosts
@all_sams
def test_tied_heads(host: str, settings: dict[str, Any]) -> None:
    check(host, TiedHeads(), vectors(6), settings)


class Subset(Net):
    """Of three tasks, "a" and "b" have an adapter in common and "c" goes past it."""

    only: ClassVar = {"a": ("a.",), "b": ("b.",), "c": ("c.", "d.")}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.adapter = nn.Linear(6, 4), nn.Linear(4, 4)
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 2)
        self.d = nn.Linear(4, 2)

    def forward(self, batch):
        features = self.trunk(batch[0]).tanh()
        adapted = self.adapter(features).tanh()
        c = self.c(features) * self.d(features)
        return {
            "a": classified(self.a(adapted), batch),
            "b": regressed(self.b(adapted), batch),
            "c": c.square().mean(),
        }


@both_hosts
@all_sams
def test_parameters_of_some_tasks(host: str, settings: dict[str, Any]) -> None:
    check(host, Subset(), vectors(6), settings, method=(MGDA, naive.mgda))


# Encoders with several outputs, and sequences.


class Pyramid(nn.Module):
    """Two levels of features, as a tuple or by name."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.low, self.high, self.named = nn.Linear(6, 4), nn.Linear(4, 4), named

    def forward(self, x: Tensor) -> Any:
        low = self.low(x).tanh()
        high = self.high(low).tanh()
        return {"low": low, "high": high} if self.named else (low, high)


class ReadsBoth(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, out)

    def forward(self, features: Any) -> Tensor:
        levels = features.values() if isinstance(features, dict) else features
        return self.linear(torch.cat(list(levels), dim=1))


class ReadsHigh(nn.Linear):
    def forward(self, features: Any) -> Tensor:
        return super().forward(features["high"] if isinstance(features, dict) else features[1])


class TransformerTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(
            8, 2, dim_feedforward=12, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        return hidden.mean(1)


class RecurrentTrunk(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.cells = kind(4, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.cells(self.embedding(tokens))[0][:, -1]


class Composed(Net):
    """The same trunk and heads as those of a MultiTaskModule."""

    only: ClassVar = {"a": ("heads.a.",), "b": ("heads.b.",)}

    def __init__(self, trunk: nn.Module, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.encoder, self.heads = trunk, nn.ModuleDict({"a": a, "b": b})

    def forward(self, batch):
        features = self.encoder(batch[0])
        a, b = self.heads["a"](features), self.heads["b"](features)
        return {"a": classified(a, batch), "b": regressed(b, batch)}


PARTS: dict[str, Callable[[], tuple[nn.Module, nn.Module, nn.Module]]] = {
    "tuple": lambda: (Pyramid(False), ReadsBoth(3), ReadsHigh(4, 2)),
    "dict": lambda: (Pyramid(True), ReadsHigh(4, 3), ReadsBoth(2)),
    "transformer": lambda: (TransformerTrunk(), nn.Linear(8, 3), nn.Linear(8, 2)),
    "lstm": lambda: (RecurrentTrunk(nn.LSTM), nn.Linear(8, 3), nn.Linear(8, 2)),
    "gru": lambda: (RecurrentTrunk(nn.GRU), nn.Linear(8, 3), nn.Linear(8, 2)),
}


@pytest.mark.parametrize("host", ["module", "taken over", "composed"])
@all_sams
@pytest.mark.parametrize("parts", PARTS)
def test_encoders(host: str, settings: dict[str, Any], parts: str) -> None:
    torch.manual_seed(0)
    net = Composed(*PARTS[parts]()).double()
    loader = vectors(6) if parts in ("tuple", "dict") else words()
    if host != "composed":
        check(host, net, loader, settings)
        return
    reference = copy.deepcopy(net)
    criteria = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
    tasks = [Task(name, net.heads[name], loss) for name, loss in criteria.items()]
    model = MultiTaskModule(net.encoder, tasks, optimizer=sgd)
    fit(model, [PCGrad(), *([TaskSAM(**settings)] if settings else [])], loader)
    naive_fit(reference, reference.only, loader, naive.pcgrad, **settings)
    assert_same(net, reference)


# Parameters on two devices.


class Elsewhere(nn.Linear):
    """Stays on its device, whatever the Trainer moves."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Elsewhere":
        return self


@both_hosts
@pytest.mark.parametrize("sam", [[], [TaskSAM(0.05)]])
def test_two_devices_are_refused(host: str, sam: list[TaskSAM]) -> None:
    model = HOSTS[host](Layered().double())
    model.far = Elsewhere(2, 2, device="meta")
    model.shared_parameters = lambda: [*model.net.trunk.parameters(), *model.far.parameters()]
    with says(ValueError, "must be on one device", "['cpu', 'meta']", "not supported"):
        fit(model, [PCGrad(), *sam], vectors(6))
