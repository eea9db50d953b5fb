"""GradientConflict sees the gradients of all processes' samples, and only looks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import GradientConflict
from tests.ddp.cases import case
from tests.ddp.net import batches
from tests.ddp.training import HOSTS, train

pytestmark = pytest.mark.ddp

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
}


def looked_at(method: str) -> list[pl.Callback]:
    return [*METHODS[method](), GradientConflict(every_n_steps=2)]


NAMES = [f"{host}/{method}" for host in HOSTS for method in METHODS]
for _name in NAMES:
    _host, _method = _name.split("/")
    _case = partial(train, host=_host, whole=batches(3))
    case(f"conflict/{_name}/with", partial(_case, method=partial(looked_at, _method)), (1, 2))
    case(f"conflict/{_name}/without", partial(_case, method=METHODS[_method]), (2,))


def figures(run: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in run["metrics"].items() if k.startswith("conflict/")}


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_those_of_one_process(runs: Any, name: str) -> None:
    (one,) = runs(1, f"conflict/{name}/with")
    first, second = map(figures, runs(2, f"conflict/{name}/with"))
    assert first == second
    assert first == pytest.approx(figures(one), rel=1e-6, abs=1e-6)
    assert {"conflict/cosine/a/b", "conflict/epoch/rate"} <= first.keys()
    assert ("conflict/between/cosine/a/a" in first) is ("F-CAGrad" in name)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same_bit_for_bit(runs: Any, name: str) -> None:
    with_it, without = (runs(2, f"conflict/{name}/{kind}") for kind in ("with", "without"))
    for found, expected in zip(with_it, without, strict=True):
        for key, value in expected["params"].items():
            assert torch.equal(found["params"][key], value), key
