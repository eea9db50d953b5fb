"""What the step refuses."""

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    NonFiniteError,
    Sharpness,
    WholePasses,
)
from lightning_flatmtl.engine.gradients.accumulation import Place
from lightning_flatmtl.engine.processes.single import SingleProcess

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class RootHead(nn.Module):
    """Finite loss and trunk gradient; the gradient of ``root`` is NaN at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.root = nn.Linear(4, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.root.abs().sqrt()


class ExpHead(nn.Linear):
    """Overflows when its weights are moved far."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


def step(head: nn.Module, sharpness: Sharpness | None) -> None:
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 1), "b": head})
    net = nn.ModuleDict({"encoder": encoder, "heads": heads})
    passes = ComposedPasses(
        encoder, lambda t, z, _: heads[t](z).square().mean(), dict.fromkeys("ab", X), net
    )
    MultiTaskStep()(net, passes, CAGrad(), sharpness)


@pytest.mark.parametrize("sharpness", [None, Sharpness(0.1, 0.1), Sharpness(0.1, 0.0)])
def test_a_head_gradient_that_is_not_finite_names_the_task(sharpness: Sharpness | None) -> None:
    with pytest.raises(NonFiniteError, match="head's gradient of task 'b' must be finite"):
        step(RootHead(), sharpness)


def test_so_does_one_at_the_perturbed_point() -> None:
    with pytest.raises(NonFiniteError, match="head's gradient at the perturbed point of task 'b'"):
        step(ExpHead(4, 1), Sharpness(0.01, 1e4))


class Two(SingleProcess):
    """Two processes seen from one, which agrees with itself."""

    size = 2


def test_an_error_that_nobody_was_told_of_outlives_a_group_that_is_broken_off() -> None:
    net = nn.Linear(4, 1)
    engine = MultiTaskStep(processes=Two())

    def one(place: Place, fails: bool = False) -> None:
        loss = net(X).square().mean()
        if fails:
            loss.register_hook(stumble)
        engine(net, WholePasses(lambda: {"a": loss}, net), CAGrad(), place=place)

    one(Place(first=True, last=False), fails=True)  # kept: nothing is summed with this batch
    with pytest.raises(LookupError, match="stumbled"):
        one(Place(first=True, last=False))
    one(Place(first=True, last=False))  # told once


def stumble(gradient: Tensor) -> None:
    raise LookupError("stumbled")
