"""What the optimizer trains is trained, also what lies in a plain dict (as in inverse problems)."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad, LinearScalarization, NashMTL
from tests.helpers import data, fit, module
from tests.hosts import HOSTS, Foreign, foreign, smooth_trunk

METHODS: dict[str, Any] = {
    "sum": lambda: [LinearScalarization()],
    "CAGrad": lambda: [CAGrad()],
    "F-LS": lambda: [TaskSAM(0.05)],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05, adaptive=True)],
    "F-NashMTL, joint": lambda: [NashMTL(normalize=True), TaskSAM(0.05, point="joint")],
}


class Unknowns:
    """A scale of the features and a shift of task a's predictions, in a dict or registered."""

    def keep(self, registered: bool) -> None:
        values = {
            "scale": nn.Parameter(torch.full((5,), 1.5, dtype=torch.float64)),
            "shift": nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)),
        }
        self.unknowns: Any = nn.ParameterDict(values) if registered else values

    def configure_optimizers(self) -> Any:
        params = [p for n, p in self.named_parameters() if "unknowns" not in n]  # type: ignore
        return torch.optim.SGD([*params, *self.unknowns.values()], lr=0.1, momentum=0.9)


class Ours(Unknowns, MultiTaskModule):
    def encode(self, batch: Any) -> Tensor:
        return super().encode(batch) * self.unknowns["scale"]

    def task_output(self, task: Any, features: Any) -> Any:
        output = super().task_output(task, features)
        return output + self.unknowns["shift"] if task == "a" else output


class Theirs(Unknowns, Foreign):
    def losses(self, batch: Any) -> dict[str, Tensor]:
        features = self.encoder(batch[0]) * self.unknowns["scale"]
        outputs = {t: head(features) for t, head in self.heads.items()}
        outputs["a"] = outputs["a"] + self.unknowns["shift"]
        return {t: self.criteria[t](y, batch[1][t]) for t, y in outputs.items()}


def made(host: str, registered: bool, **settings: Any) -> Any:
    trunk = smooth_trunk()
    net = (
        module(kind=Ours, trunk=trunk, **settings)
        if host == "module"
        else foreign(Theirs, trunk=trunk)
    )
    net.keep(registered)
    return net


def trained(host: str, registered: bool, callbacks: list[pl.Callback], **settings: Any) -> Any:
    net = made(host, registered, **settings)
    before = {name: p.detach().clone() for name, p in net.unknowns.items()}
    fit(net, callbacks, data(24), max_epochs=2)
    for name, p in net.unknowns.items():
        assert (p - before[name]).abs().min() > 1e-6, name
    every = {id(p): p for p in [*net.parameters(), *net.unknowns.values()]}
    return torch.cat([p.detach().flatten() for p in every.values()])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_they_are_trained_like_registered_ones(host: str, name: str) -> None:
    found, expected = (trained(host, registered, METHODS[name]()) for registered in (False, True))
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-11, atol=1e-12)


def test_at_the_features_too() -> None:
    runs = [trained("module", r, [CAGrad()], gradients="features") for r in (False, True)]
    torch.testing.assert_close(runs[0].sort().values, runs[1].sort().values, rtol=1e-11, atol=1e-12)
