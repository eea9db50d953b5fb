"""``MultiTaskModule(gradients="gram")``: the same training in less memory, and what it refuses."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import MGDA, CAGrad, GradDrop, LinearScalarization, PCGrad
from lightning_flatmtl.callbacks import GradientConflict
from lightning_flatmtl.engine.gradients import without_matrix
from tests.helpers import assert_close, assert_identical, fit, module
from tests.test_bad_input import single_precision
from tests.test_penalty import Penalised, WholePenalised


def trunk() -> nn.Module:
    """Layers with more parameters than a batch has activations, and dropout."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 40), nn.Tanh(), nn.Dropout(0.2), nn.Linear(40, 40), nn.Tanh(),
        nn.Linear(40, 5),
    )  # fmt: skip


def made(**kwargs: Any) -> Any:
    return module(trunk=trunk(), **kwargs)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The results of the steps without the matrix."""
    seen: list[Any] = []
    whole = without_matrix._differentiate

    def noted(*args: Any) -> Any:
        seen.append(len(args[1]))
        return whole(*args)

    monkeypatch.setattr(without_matrix, "_differentiate", noted)
    return seen


@pytest.mark.parametrize("kind", [None, Penalised, WholePenalised])
@pytest.mark.parametrize("method", [CAGrad, MGDA, lambda: PCGrad(seed=3)])
def test_training_is_that_with_the_rows(kind: Any, method: Any, steps: list[Any]) -> None:
    settings = {} if kind is None else {"kind": kind}
    found = {}
    for gradients in ("parameters", "gram"):
        found[gradients] = made(gradients=gradients, **settings)
        torch.manual_seed(11)
        assert fit(found[gradients], [method()]).global_step == 3
    assert_close(found["gram"], found["parameters"], 1e-10)
    assert len(steps) == 3
    assert min(steps) > 1


def test_a_conflict_is_logged_without_the_matrix(steps: list[Any]) -> None:
    logged = {}
    for gradients in ("parameters", "gram"):
        for method in (CAGrad, LinearScalarization):
            torch.manual_seed(11)
            net = made(gradients=gradients)
            trainer = fit(net, [method(), GradientConflict(every_n_steps=1)], log_every_n_steps=1)
            logged[gradients, method] = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "loss" not in name
            }
    for method in (CAGrad, LinearScalarization):
        assert logged["gram", method]
        assert logged["gram", method].keys() == (logged["parameters", method].keys())
        for name, value in logged["gram", method].items():
            assert value == pytest.approx(logged["parameters", method][name], rel=1e-9), name
    assert len(steps) == 6


def test_a_weighting_of_the_losses_needs_no_gram(steps: list[Any]) -> None:
    found, expected = (
        made(gradients="gram", accumulate_grad_batches=3),
        made(accumulate_grad_batches=3),
    )
    for net in (found, expected):
        torch.manual_seed(11)
        fit(net, [LinearScalarization()])
    assert_identical(found, expected)
    assert steps == []


@pytest.mark.parametrize(
    ("settings", "method", "said"),
    [
        ({}, [CAGrad(), TaskSAM(0.1)], "TaskSAM needs the task gradients"),
        ({}, [GradDrop()], "inner products of the task gradients only, got GradDrop"),
        ({"accumulate_grad_batches": 2}, [CAGrad()], "accumulate_grad_batches=1, got 2"),
    ],
)
def test_what_needs_the_rows_is_refused_at_once(settings: Any, method: Any, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        fit(made(gradients="gram", **settings), method)


def test_several_processes_are_refused() -> None:
    from lightning_flatmtl.hosting.refusals import refuse_unfit_for_gram

    with pytest.raises(MisconfigurationException, match="for one device, got 2 processes"):
        refuse_unfit_for_gram(CAGrad(), 2)
    refuse_unfit_for_gram(CAGrad(), 1)


def test_half_precision(steps: list[Any]) -> None:
    nets = []
    for gradients in ("parameters", "gram"):
        net = made(gradients=gradients).float()
        torch.manual_seed(11)
        fit(net, [CAGrad()], single_precision(), precision="bf16-mixed")
        nets.append(net)
    assert_close(*nets, 0.02)
    assert steps
