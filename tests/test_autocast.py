"""Every backward pass runs as plain Lightning's does: outside autocast, under the loss scale."""

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import MGDA, CAGrad, LinearScalarization
from tests.helpers import data, fit, sgd
from tests.hosts import HOSTS, foreign, single, values


def half(scale: float = 2.0**16) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def precision(bits: str) -> dict[str, Any]:
    return {"precision": "bf16-mixed"} if bits == "bf16" else half(2.0**10)


class OptsOut(nn.Module):
    """A layer that insists on 32 bits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float())


class Spy(torch.autograd.Function):
    """Notes whether autocast is on in forward and backward passes."""

    forwards: ClassVar[list[bool]] = []
    backwards: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Spy.forwards.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        Spy.backwards.append(torch.is_autocast_enabled("cpu"))
        return gradients[0]


class Spied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Spy.apply(x)


class Checkpointed(nn.Module):
    """A reentrant checkpoint, whose forward pass runs again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)


def hiding() -> nn.Module:
    return Checkpointed(nn.Sequential(nn.Linear(64, 64), Spied()))


class Moves(pl.Callback):
    """The optimizer's step is part of what plain Lightning runs outside autocast."""

    def __init__(self) -> None:
        self.within: list[bool] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.within.append(torch.is_autocast_enabled("cpu"))


def trunk(*more: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 64),
        nn.Tanh(),
        OptsOut(nn.Linear(64, 64)),
        nn.Tanh(),
        *(make() for make in more),
        nn.Linear(64, 5),
    )


def made(host: str, net: nn.Module, **kwargs: Any) -> Any:
    return HOSTS[host](trunk=net, **kwargs).float()


def plain(net: nn.Module, **settings: Any) -> Tensor:
    model = foreign(trunk=net).float()
    fit(model, loader=single(data()), **settings)
    return values(model)


@pytest.mark.parametrize("bits", ["bf16", "fp16"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_sum_is_plain_lightnings_to_the_last_bit(host: str, bits: str, accumulate: int) -> None:
    """A backward pass under autocast would be 0.3 % off where a part has opted out."""
    groups = {"accumulate_grad_batches": accumulate}
    expected = plain(trunk(), **precision(bits), **groups)
    of_module, of_trainer = (groups, {}) if host == "module" else ({}, groups)
    for callbacks in ([LinearScalarization()], []):
        model = made(host, trunk(), **of_module)
        fit(model, callbacks, single(data()), **precision(bits), **of_trainer)
        assert torch.equal(values(model), expected)


PATHS: dict[str, Callable[[], list[pl.Callback]]] = {
    "sum": lambda: [LinearScalarization()],
    "rows": lambda: [CAGrad()],
    "separate": lambda: [CAGrad(), TaskSAM(0.05)],
    "joint": lambda: [MGDA(), TaskSAM(0.05, point="joint")],
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", [*PATHS, "features"])
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "checkpoint"])
def test_no_backward_pass_runs_under_autocast(host: str, path: str, hidden: bool) -> None:
    if path == "features" and (host != "module" or hidden):
        return
    settings = {"gradients": "features"} if path == "features" else {}
    model = made(host, trunk(hiding if hidden else Spied), **settings)
    Spy.forwards, Spy.backwards, moves = [], [], Moves()
    callbacks = [CAGrad()] if path == "features" else PATHS[path]()
    fit(model, [*callbacks, moves], single(data()), precision="bf16-mixed")
    assert Spy.backwards
    assert not any(Spy.backwards)
    assert all(Spy.forwards)  # those of the second pass too
    assert moves.within == [False] * 3


# "16-mixed": the trunk's backward pass at the features needs the loss scale too.


class Tiny(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        return 1e-5 * self.loss(predictions.float(), target)


class Kept(pl.Callback):
    """The gradients of the first step, unscaled."""

    gradients: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.gradients is None:
            parts = [p.grad.flatten() for p in pl_module.encoder.parameters()]
            self.gradients = torch.cat(parts).clone()


def first_gradient(gradients: str, settings: dict[str, Any]) -> Tensor:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.Tanh(), nn.Linear(64, 5), nn.Tanh())
    model = made("module", net, gradients=gradients, optimizer=sgd)
    for task in model.tasks:
        task.loss = Tiny(task.loss)
    kept = Kept()
    fit(model, [LinearWithGradients(), kept], single(data()), **settings)
    assert kept.gradients is not None
    return kept.gradients


class LinearWithGradients(LinearScalarization):
    """The sum by rows, for which the gradients at features and at parameters are the same."""

    @property
    def needs_gradients(self) -> bool:
        return True


@pytest.mark.parametrize("gradients", ["parameters", "features"])
def test_small_gradients_survive_16_bits(gradients: str) -> None:
    expected = first_gradient(gradients, {})
    found = first_gradient(gradients, half())
    assert (found - expected).norm() < 0.005 * expected.norm()
    assert (found == 0).float().mean() <= (expected == 0).float().mean() + 1e-3
