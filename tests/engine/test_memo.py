"""With one head moved, only that head runs again, and the answer is the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine import MultiTaskStep, Sharpness, WholePasses
from lightning_flatmtl.engine.memo import CallMemo
from tests.helpers import Calls

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A trunk and two heads; the subclasses are awkward in one way each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4))
        self.mix = nn.Linear(4, 4)
        self.a = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3))
        self.b = nn.Linear(4, 3)
        self.double()

    def losses(self) -> dict[str, Tensor]:
        z = self.trunk(X)
        return {"a": self.loss(self.a(z)), "b": self.loss(self.b(z))}

    def loss(self, predictions: Tensor) -> Tensor:
        return (predictions - Y).square().mean()


class GluedByFunctions(Net):
    def losses(self):
        z = torch.relu(self.trunk(X.float().double() * 1.0) + 0.1)
        return {"a": self.loss(self.a(z)), "b": self.loss(self.b(z).tanh())}


class DetachedTeacher(Net):
    """Task b learns what task a predicts; the trunk runs on it, without a graph in between."""

    def losses(self):
        teacher = self.a(self.trunk(X))
        again = self.trunk(torch.cat([teacher, teacher[:, :1]], dim=1).detach())
        return {"a": self.loss(teacher), "b": self.loss(self.b(again) + self.mix(again)[:, :3])}


class InPlace(Net):
    def losses(self):
        z = self.trunk(X)
        first = self.a(z.clone())
        return {"a": self.loss(first), "b": self.loss(self.b(z.mul_(2.0)))}


class Stash(Net):
    """Keeps an activation on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk[1].register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def losses(self):
        z = self.trunk(X)
        return {"a": self.loss(self.a(z) * self.kept[:, :3]), "b": self.loss(self.b(z))}


class ReplacingHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.trunk.register_forward_hook(lambda layer, args, output: 2.0 * output + 1.0)


class Recurrent(Net):
    def losses(self):
        z = self.trunk(X)
        for _ in range(3):
            z = self.mix(z).tanh()
        return {"a": self.loss(self.a(z)), "b": self.loss(self.b(z + self.trunk(X)))}


class ByKeyword(Net):
    def losses(self):
        z = self.trunk(input=X)
        return {"a": self.loss(self.a(input=z)), "b": self.loss(self.b(input=z))}


class NoGrad(Net):
    def losses(self):
        with torch.no_grad():
            anchor = self.trunk(X)
        z = self.trunk(X)
        return {"a": self.loss(self.a(z) + anchor[:, :3]), "b": self.loss(self.b(z - anchor))}


class StillHead(Net):
    """A last layer of zeros: the layers before it move, its own input does not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.a[0].weight.zero_(), self.a[0].bias.zero_()


class GradientPenalty(Net):
    """Differentiates at the features within the step."""

    def losses(self):
        z = self.trunk(X)
        loss = self.loss(self.a(z))
        (g,) = torch.autograd.grad(loss, z, create_graph=True)
        return {"a": loss + g.square().sum(), "b": self.loss(self.b(z))}


class Forces(Net):
    """Differentiates at the inputs within the step."""

    def losses(self):
        x = X.clone().requires_grad_()
        energy = self.a(self.trunk(x))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return {"a": self.loss(energy), "b": self.loss(self.b(self.trunk(x)) + force[:, :3])}


class Centred(nn.Module):
    """Moves a buffer that a loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * z.detach().mean(0)
        return z


class MovedBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Centred()

    def losses(self):
        z = self.centre(self.trunk(X))
        return {"a": self.loss(self.a(z - self.centre.mean)), "b": self.loss(self.b(z))}


class HiddenHead(Net):
    """A trunk that uses a head without having it."""

    def __init__(self) -> None:
        super().__init__()
        self.hiding = Hiding(self.a)

    def losses(self):
        z = self.trunk(X)
        return {"a": self.loss(self.a(z) + self.hiding(z)), "b": self.loss(self.b(z))}


class Hiding(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.ref = [head]
        self.own = nn.Linear(3, 3).double()

    def forward(self, z: Tensor) -> Tensor:
        return self.own(self.ref[0](z))


class CollectedByHooks(Net):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[1].register_forward_hook(lambda layer, args, out: self.seen.append(out))

    def losses(self):
        self.seen: list[Tensor] = []
        z = self.trunk(X)
        (inner,) = self.seen
        return {"a": self.loss(self.a(inner[:, :4])), "b": self.loss(self.b(z))}


NETS = [
    StillHead,
    GradientPenalty,
    Forces,
    MovedBuffer,
    HiddenHead,
    CollectedByHooks,
    Net,
    GluedByFunctions,
    DetachedTeacher,
    InPlace,
    Stash,
    ReplacingHook,
    Recurrent,
    ByKeyword,
    NoGrad,
]


@contextmanager
def nothing(self: CallMemo, *_: Any) -> Iterator[None]:
    yield


def gradients(net: Net, steps: int = 2) -> list[Tensor | None]:
    engine, found = MultiTaskStep(), []
    torch.manual_seed(9)
    for _ in range(steps):  # what is a head is known from the second step on
        net.zero_grad()
        result = engine(net, WholePasses(net.losses, net), CAGrad(0.4), Sharpness(0.3, 0.5))
        assert result is not None
        result.loss.backward()
        found += [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return found


@pytest.mark.parametrize("kind", NETS)
def test_the_answer_is_that_of_running_everything(
    monkeypatch: pytest.MonkeyPatch, kind: type[Net]
) -> None:
    ours = gradients(kind())
    monkeypatch.setattr(CallMemo, "recording", nothing)
    monkeypatch.setattr(CallMemo, "serving", nothing)
    plain = gradients(kind())
    for a, b in zip(ours, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        calls: list[int] = []  # not in the module, where it would be put back
        self.note, self.count = lambda: calls.append(1), lambda: len(calls)
        self.forget = calls.clear

    def forward(self, x: Tensor) -> Tensor:
        self.note()
        return x


def test_only_the_moved_head_runs() -> None:
    net = Net()
    engine = MultiTaskStep()
    counted = [Counted() for _ in range(3)]
    for part, layer in zip((net.trunk, net.a), counted, strict=False):
        part.insert(0, layer)
    net.b = nn.Sequential(counted[2], net.b)
    counts = []
    for _ in range(2):
        engine(net, WholePasses(net.losses, net), CAGrad(0.4), Sharpness(0.3, 0.5))
        counts.append([layer.count() for layer in counted])
        for layer in counted:
            layer.forget()
    everything = 1 + 2 + 2  # clean, shared of each task, head of each task
    assert counts[0] == [everything, everything, everything]
    # A layer without parameters in front of the moved head is answered for too.
    assert counts[1] == [1 + 2, 1 + 2, 1 + 2]
    assert "forward" not in vars(net.trunk) | vars(net.b)


def test_a_changed_answer_is_not_given_again() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    memo = CallMemo(net, WholePasses(dict, net)._tape)
    x = torch.ones(1, 2)
    first = Calls(net[0])
    with memo.recording([list(net[1].parameters())]):
        before = net[0](x)
    with memo.serving(list(net[1].parameters())):
        assert torch.equal(net[0](x), before)
    x += 1.0
    with memo.serving(list(net[1].parameters())):
        assert not torch.equal(net[0](x), before)
    assert first.count == 3  # hooks run for answers from memory as well
