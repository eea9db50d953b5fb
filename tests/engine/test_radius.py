"""However short or long a gradient is, the parameters move by exactly the radius."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.gradients.radius import move_along
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.takeover import second_pass
from tests.helpers import data, fit
from tests.hosts import HOSTS, single, smooth_trunk, values

RHO = 0.05
DIRECTION = torch.tensor([0.6, -0.8, 0.0, 1e-3], dtype=torch.float64)
LENGTHS = {
    torch.float32: [1e-43, 1e-40, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e38],
    torch.float64: [1e-310, 1e-200, 1e-160, 1e-140, 1.0, 1e130],
}


def move(dtype: torch.dtype, length: float, weights: Tensor | None = None) -> tuple[Tensor, Any]:
    """The move of zeros, and of parameters that are ``weights`` if it is adaptive."""
    row = (DIRECTION * length).to(dtype)
    if weights is None:
        squared = squared_norms(row[None]).item()
        found = move_along(row, RHO, squared)
    else:
        squared = squared_norms(row[None], weights).item()
        found = move_along(row, RHO, squared, weights, weights.square())
    start = torch.zeros(4, dtype=dtype)
    layout = FlatParameters([nn.Parameter(start.clone())])
    layout.add(*found)
    return layout.values().double(), row.double()


@pytest.mark.parametrize("dtype", LENGTHS)
def test_any_gradient_moves_by_the_radius(dtype: torch.dtype) -> None:
    for length in LENGTHS[dtype]:
        moved, row = move(dtype, length)
        unit = row / row.abs().max()
        torch.testing.assert_close(moved, RHO * unit / unit.norm(), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", LENGTHS)
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_adaptive_too(dtype: torch.dtype, size: float) -> None:
    weights = (size * torch.tensor([0.5, 2.0, 3.0, -1.0])).to(dtype)
    for length in LENGTHS[dtype]:
        if dtype == torch.float32 and length * size > 1e37:
            continue
        moved, row = move(dtype, length, weights)
        w = weights.double()
        weighed = row / row.abs().max() * w
        torch.testing.assert_close(
            moved, RHO * w * weighed / weighed.norm(), rtol=2e-6, atol=1e-12 * size
        )


@pytest.mark.parametrize("dtype", LENGTHS)
def test_no_direction_no_move(dtype: torch.dtype) -> None:
    for weights in (None, torch.ones(4, dtype=dtype)):
        moved, _ = move(dtype, 0.0, weights)
        assert not moved.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("length", [1e-9, 1e-7, 1e-3, 1e3])
def test_parameters_of_16_bits(dtype: torch.dtype, adaptive: bool, length: float) -> None:
    """Rows have 32 bits; 16 hold neither their entries nor what they are multiplied by."""
    torch.manual_seed(0)
    row = length * nn.functional.normalize(torch.randn(2048), dim=0)
    layout = FlatParameters([nn.Parameter(torch.full((2048,), 0.5, dtype=dtype))])
    start = layout.values()
    squared = squared_norms(row[None], start if adaptive else None).item()
    given = (start, start.square()) if adaptive else (None, None)
    layout.add(*move_along(row, 5.0, squared, *given))
    moved = layout.values() - start
    expected = (2.5 if adaptive else 5.0) * nn.functional.normalize(row, dim=0)
    assert (moved - expected).norm() < 4 * torch.finfo(dtype).eps * start.norm()


# The same in training: a saturated cross-entropy.


class Margin(nn.Module):
    """The cross-entropy of logits that are ``by`` apart."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        right = nn.functional.one_hot(target, 3).to(predictions)
        return nn.functional.cross_entropy(predictions + self.by * right, target)


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


def saturated(host: str, margin: float, **settings: Any) -> Any:
    model = HOSTS[host](trunk=smooth_trunk(), **settings).float()
    if host == "module":
        model.tasks[0].loss = Margin(margin)
    else:
        model.criteria["a"] = Margin(margin)
    return model


class Radii:
    """How far the shared parameters are from where the clean pass was."""

    def __init__(self, model: Any) -> None:
        self.model, self.found = model, []
        model.encoder.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        if second_pass(self.model):
            now = values(self.model.encoder)
            self.found.append(float(((now - self.start) / self.scale).double().norm()))
        else:
            self.start = values(self.model.encoder)
            adaptive = self.adaptive
            self.scale = self.start.abs() if adaptive else torch.ones_like(self.start)

    adaptive = False


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("margin", [0.0, 75.0, 80.0, 86.0, 90.0, 95.0, 200.0])
@pytest.mark.filterwarnings("ignore:The loss of .* is exactly zero")  # at 200
def test_a_saturated_loss(host: str, adaptive: bool, margin: float) -> None:
    model = saturated(host, margin, optimizer=still)
    radii = Radii(model)
    radii.adaptive = adaptive
    sam = TaskSAM(RHO, rho_heads=0.0, adaptive=adaptive)
    fit(model, [sam], single(data(8)))
    first, second = (radii.found[0], radii.found[-1])
    assert second == pytest.approx(RHO, rel=1e-4)
    assert first == (0.0 if margin == 200.0 else pytest.approx(RHO, rel=1e-4))
    assert values(model).isfinite().all()


@pytest.mark.parametrize("host", HOSTS)
def test_it_trains_with_an_aggregator(host: str) -> None:
    model = saturated(host, 85.0)
    fit(model, [CAGrad(), TaskSAM(RHO)], single(data(24)))
    assert values(model).isfinite().all()
