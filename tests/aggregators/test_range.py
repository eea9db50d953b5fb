"""Gradients and losses near the ends of the range of float32: finite directions, or a name."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl import aggregators as a
from lightning_flatmtl.aggregators import Aggregator, LossWeighting
from lightning_flatmtl.engine import NonFiniteError, TaskGradients
from tests.aggregators.specs import SPECS, Spec
from tests.helpers import data, fit, module
from tests.hosts import HOSTS, foreign, single, values

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
BOTH = pytest.mark.parametrize("host", HOSTS)


@ALL
@pytest.mark.parametrize("small", [1e-44, 1e-39, 7.6e-30, 1e-20])
def test_short_rows_give_a_finite_direction(spec: Spec, small: float) -> None:
    matrix = torch.tensor([[small, 0.0], [-1.0, 1.0]])
    aggregator = spec.make()
    for _ in range(3):  # also with what the first calls have left in its state
        direction = aggregator(matrix, losses=[small, 1.0])
        assert torch.isfinite(direction).all()


@ALL
def test_long_rows_give_a_finite_direction(spec: Spec) -> None:
    matrix = torch.tensor([[1e37, 2e37, 0.0], [-1e37, 1e37, 1.0]])
    aggregator = spec.make()
    for _ in range(3):
        assert torch.isfinite(aggregator(matrix, losses=[1.0, 2.0])).all()


def test_the_weight_of_a_short_row_carries_its_length() -> None:
    matrix = torch.tensor([[1e-39, 0.0], [0.0, 1.0]])
    # The norm of every term is 1, whatever the rows' norms.
    torch.testing.assert_close(a.NashMTL()(matrix), torch.ones(2))
    torch.testing.assert_close(
        a.PCGrad()(torch.tensor([[1e-39, 0.0], [-1.0, 1.0]])), torch.tensor([0.0, 1.0])
    )


def test_a_direction_beyond_the_range_names_method_and_task() -> None:
    matrix = torch.tensor([[3e38, 0.0], [2e38, 1.0]])
    with pytest.raises(
        NonFiniteError,
        match=r"direction of LinearScalarization\(weights=None\) .* that of task 'depth', whose "
        r"gradient has the norm 3e\+38 and the weight 1\.",
    ):
        a.LinearScalarization()(matrix, tasks=["depth", "seg"])


class Lost(Aggregator):
    """Gives no number."""

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return torch.full_like(gradients.jacobian[0], math.nan)


class LostWeights(a.GramAggregator):
    """Gives no number for the second task."""

    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return torch.tensor([1.0, math.nan], dtype=torch.float64)


class LostLosses(LossWeighting):
    """The same for whole losses."""

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return torch.tensor([1.0, math.inf], dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("method", [Lost, LostWeights, LostLosses])
def test_what_is_not_finite_is_refused_before_a_parameter_moves(host: str, method: type) -> None:
    net = HOSTS[host]()
    before = values(net)
    task = "'[ab]'" if method is Lost else "'b'"
    with pytest.raises(NonFiniteError, match=rf"of {method.__name__}\(\) must be finite.*{task}"):
        fit(net, [method()])
    assert torch.equal(values(net), before)


class Faint(nn.Module):
    """A criterion whose value and gradient are tiny."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = nn.CrossEntropyLoss(), factor

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.inner(prediction, target) * self.factor


def faint(host: str, factor: float) -> Any:
    """The net of the tests in 32 bits, its task a memorised."""
    made = module()
    made.tasks[0].loss = Faint(factor)
    if host == "taken over":
        taken = foreign()
        taken.criteria["a"] = Faint(factor)
        made = taken
    return made.float()


METHODS = {
    "NashMTL": a.NashMTL,
    "CAGrad": a.CAGrad,
    "ConFIG": a.ConFIG,
    "FairGrad": a.FairGrad,
    "GradVac": a.GradVac,
    "PCGrad": a.PCGrad,
    "UPGrad": a.UPGrad,
    "ScaleInvariant": a.ScaleInvariant,
    "DBMTL": a.DBMTL,
    "DBMTL-average": lambda: a.DBMTL(0.5),
    "GLS": a.GLS,
    "STCH": lambda: a.STCH(warmup_epochs=0),
}


@BOTH
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [1e-30, 3e-40, 1e-42])
def test_a_memorised_task_leaves_finite_parameters(host: str, name: str, factor: float) -> None:
    net = faint(host, factor)
    fit(net, [METHODS[name]()], single(data()), max_epochs=2)
    assert torch.isfinite(values(net)).all()


@pytest.mark.parametrize("name", ["ScaleInvariant", "GLS", "STCH", "DBMTL"])
def test_a_memorised_task_with_flatness(name: str) -> None:
    net = faint("module", 1e-39)
    fit(net, [METHODS[name](), TaskSAM(1e-3)], single(data()), max_epochs=2)
    assert torch.isfinite(values(net)).all()


@BOTH
def test_a_faint_task_counts_as_its_logarithm_says(host: str) -> None:
    """The logarithm of a loss moves as it does for the same loss times a constant."""
    expected, net = faint(host, 1.0), faint(host, 1e-25)
    for model in (expected, net):
        fit(model, [a.ScaleInvariant()], single(data(8)), max_epochs=1)
    torch.testing.assert_close(values(net), values(expected), rtol=1e-3, atol=1e-5)


def test_upgrad_harms_no_task_near_stationarity() -> None:
    """Rows that nearly cancel, in float32: the rounding error is that of the sum, not the terms."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        row = torch.randn(64, generator=g)
        across = torch.randn(3, 64, generator=g)
        matrix = torch.stack([row, -row, 0.5 * row]) + 1e-5 * across
        direction = a.UPGrad()(matrix).double()
        cosines = matrix.double() @ direction / (matrix.double().norm(dim=1) * direction.norm())
        assert cosines.min() >= -1e-5, seed
