"""The second pass computes the same function as the clean one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import MGDA
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    Partition,
    Sharpness,
    WholePasses,
)

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class MovingMean(nn.Module):
    """Subtracts a moving mean that the same forward pass has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


class Leaving(nn.Module):
    """Leaves what it has seen in a buffer, for :class:`Reading`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 2 * self.scale
        return x


class Reading(nn.Module):
    """Reads what the encoder has left behind."""

    def __init__(self, left: Leaving) -> None:
        super().__init__()
        self.left = [left]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.left[0].scale


def reading_net() -> "Net":
    left = Leaving()
    net = Net(trunk=nn.Sequential(nn.Linear(4, 4), left), head=Reading(left))
    net.heads["b"].insert(0, Reading(left))
    return net


class Net(nn.Module):
    """Two heads on a trunk, either of which can be made awkward."""

    def __init__(self, trunk: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(trunk or nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.Linear(4, 3)) for t in ("a", "b")})
        if head is not None:
            self.heads["a"].insert(0, head)
        self.double()

    def loss(self, task: str, features: Tensor) -> Tensor:
        return self.heads[task](features).square().mean()

    def losses(self) -> dict[str, Tensor]:
        features = self.encoder(X)
        return {task: self.loss(task, features) for task in self.heads}

    def passes(self, whole: bool) -> ComposedPasses | WholePasses:
        if whole:
            return WholePasses(self.losses, self)
        return ComposedPasses(
            self.encoder,
            lambda task, features, _: self.loss(task, features),
            dict.fromkeys(self.heads, X),
            self,
        )


def gradients(net: Net, sharpness: Sharpness | None, whole: bool) -> dict[str, Tensor]:
    torch.manual_seed(5)
    net = copy.deepcopy(net)
    MultiTaskStep()(net, net.passes(whole), None, sharpness).loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in b)


AWKWARD = {
    "plain": Net(),
    "dropout": Net(trunk=nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), head=nn.Dropout(0.5)),
    "moving mean": Net(nn.Sequential(nn.Linear(4, 4), MovingMean())),
    "moving mean in a head": Net(head=MovingMean()),
    "heads that read what the encoder leaves": reading_net(),
    "spectral norm": Net(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "instance norm": Net(
        nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
        )
    ),
}


@pytest.mark.parametrize("net", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("whole", [False, True], ids=["composed", "whole"])
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_a_vanishing_radius_changes_nothing(net: Net, whole: bool, point: str) -> None:
    plain = gradients(net, None, whole)
    tiny = gradients(net, Sharpness(1e-9, 1e-9, point=point), whole)
    assert largest_difference(tiny, plain) < 1e-6
    # And a radius that does not vanish changes something, so the line above can fail.
    assert largest_difference(gradients(net, Sharpness(0.1, 0.1, point=point), whole), plain) > 1e-4


@pytest.mark.parametrize("layer", [nn.Dropout(0.5, inplace=True), nn.Hardswish(inplace=True)])
def test_features_that_a_head_changes_in_place_are_computed_anew(layer: nn.Module) -> None:
    net = Net(head=layer)
    found = []
    for sharpness in (None, Sharpness(1e-9, 1e-9)):
        torch.manual_seed(5)
        passes = ComposedPasses(
            net.encoder, lambda task, features, _: net.loss(task, features), {"a": X}, net
        )
        step = MultiTaskStep(Partition(shared=net.encoder.parameters()))
        net.zero_grad()
        step(net, passes, MGDA(), sharpness).loss.backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert largest_difference(found[1], found[0]) < 1e-6


def test_the_head_pass_spares_the_trunk() -> None:
    net, calls = Net(), []
    net.encoder.register_forward_hook(lambda *_: calls.append(1))
    MultiTaskStep()(net, net.passes(False), None, Sharpness(0.1, 0.1))
    assert len(calls) == 3  # once clean, once for each task


def test_a_batch_with_nothing_gives_nothing() -> None:
    net = Net()
    passes = ComposedPasses(net.encoder, lambda *_: None, dict.fromkeys(net.heads, X), net)
    assert MultiTaskStep()(net, passes, None, Sharpness()) is None
