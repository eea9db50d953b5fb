"""Shared and own parts on one process or on several: the same training, in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import CGC, PLE, CrossStitch, MMoE, SoftSharing, TaskAttention
from tests.ddp.cases import case
from tests.ddp.net import TASKS, Batches, module, share
from tests.ddp.test_penalty import sparse
from tests.ddp.training import Diary, deviation, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


def mlp(inputs: int = 6, outputs: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "soft": lambda: SoftSharing(TASKS, mlp(), weight=0.1),
    "cross-stitch": lambda: CrossStitch(TASKS, [mlp(outputs=5), mlp(5)], channels=[5]),
    "MMoE": lambda: MMoE(TASKS, mlp(5), 3, gate_features=5, stem=mlp(outputs=5)()),
    "CGC": lambda: CGC(TASKS, mlp(), gate_features=6),
    "PLE": lambda: PLE(TASKS, [mlp(outputs=5), mlp(5)], gate_features=[6, 5]),
    "attention": lambda: TaskAttention(TASKS, mlp(outputs=5)(), mlp(5), 4, 2),
}


def run(place: Place, name: str, flat: bool) -> dict[str, Any]:
    """Batches that lack tasks, in one process or in all."""
    model = module(make_trunk=ENCODERS[name])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    diary = Diary()
    made = trainer(place, [CAGrad(), *([TaskSAM(0.05)] if flat else []), diary])
    made.fit(model, Batches(share(batch, place, keys=True) for batch in sparse()))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"start": start, "params": params, "hashes": diary.hashes, "moved": diary.moved}


COMBINATIONS = [*((name, True) for name in ENCODERS), ("MMoE", False)]

for _name, _flat in COMBINATIONS:
    case(f"sharing/{_name}/{_flat}", partial(run, name=_name, flat=_flat), sizes=(1, 2))


@pytest.mark.parametrize(("name", "flat"), COMBINATIONS)
def test_as_one_process(runs: Any, name: str, flat: bool) -> None:
    (one,) = runs(1, f"sharing/{name}/{flat}")
    first, *_ = several = runs(2, f"sharing/{name}/{flat}")
    assert deviation(one["params"], one["start"]) > 1e-3
    for found in several:
        assert deviation(found["params"], one["params"]) < 1e-10
        assert found["hashes"] == first["hashes"]
        assert found["moved"] == one["moved"]
