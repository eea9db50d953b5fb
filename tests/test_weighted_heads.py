"""Weights of whole losses reach the heads, also where TaskSAM differentiates task by task.

Without TaskSAM one backward pass of the weighted sum sees to it. With it, shared parameters and
heads get their gradients on ways of their own, and a weight may be lost on one of them.
"""

import copy

import pytest
from torch import Tensor, nn
from torch.func import functional_call

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import LinearScalarization
from tests import naive
from tests.helpers import assert_close, data, fit, module, sgd
from tests.hosts import HOSTS, Foreign, smooth_trunk

WEIGHTS = {"a": 3.0, "b": 0.25}
CRITERIA = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}


def naive_fit(net: nn.Module, **settings: object) -> None:
    """Train by hand: the weighted sum of the rows, and every head times its weight."""
    names = dict(net.named_parameters())
    shared = [name for name in names if name.startswith("encoder.")]
    heads = {t: [name for name in names if name.startswith(f"heads.{t}.")] for t in WEIGHTS}
    optimizer = sgd(net.parameters())
    for x, y in data():

        def loss_of(task: str, x=x, y=y):
            return lambda params: CRITERIA[task](functional_call(net, params, (x,))[task], y[task])

        def weigh(rows: Tensor, losses: Tensor) -> Tensor:
            return rows.new_tensor(list(WEIGHTS.values())) @ rows

        at = {name: p.detach().clone() for name, p in names.items()}
        losses = {t: loss_of(t) for t in WEIGHTS}
        grads = naive.f_mtl_gradients(losses, at, shared, heads, weigh, **settings)
        for name, p in names.items():
            owner = next((t for t in WEIGHTS if name in heads[t]), None)
            p.grad = grads[name] * (1.0 if owner is None else WEIGHTS[owner])
        optimizer.step()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("point", ["separate", "joint"])
@pytest.mark.parametrize("arm", ["split", "direct"])
def test_three_steps(host: str, point: str, arm: str) -> None:
    ours = HOSTS[host](trunk=smooth_trunk().double())
    reference = copy.deepcopy(module(trunk=smooth_trunk().double()))
    assert isinstance(ours, Foreign) == (host == "taken over")
    assert nn.utils.parameters_to_vector(ours.parameters()).equal(
        nn.utils.parameters_to_vector(reference.parameters())
    )
    fit(ours, [LinearScalarization(WEIGHTS), TaskSAM(0.05, point=point, aggregate=arm)])
    naive_fit(reference, rho=0.05, point=point, arm=arm)
    assert_close(ours, reference, 1e-10)
