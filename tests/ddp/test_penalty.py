"""A term that belongs to no task, on one process or on several."""

from functools import partial
from typing import Any

import pytest
import torch

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from tests.ddp.cases import case
from tests.ddp.net import TASKS, Batches, Foreign, adamw, batches, module, share, without
from tests.ddp.test_partial_labels import Spare
from tests.ddp.training import Diary, deviation, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

METHODS: dict[str, Any] = {
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}
QUIET = 1
"""The batch that has no penalty in any process."""


def of(net: Any) -> torch.Tensor:
    """It reaches a parameter that no task reaches."""
    return 0.1 * net.encoder.spare.square().sum() + 0.02 * sum(
        p.square().sum() for p in net.heads.parameters()
    )


class Penalised(MultiTaskModule):
    def penalty(self, batch, batch_idx):
        return None if batch_idx == QUIET else of(self)


class Taken(Foreign):
    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        if batch_idx == QUIET:
            return out
        return {**out, "loss": out["loss"] + of(self), "penalty": of(self)}


def sparse() -> Any:
    """Tasks that a process lacks, and a batch of which the last process has no label."""
    made = batches(4)
    without(made[0], "b", slice(6, 12))
    without(made[1], "a", slice(0, 6))
    for task in TASKS:
        without(made[3], task, slice(6, 12))
    return made


def run(place: Place, host: str, name: str, accumulated: int) -> dict[str, Any]:
    ours = host == "module"
    settings = {"accumulate_grad_batches": accumulated}
    kwargs: dict[str, Any] = {"optimizer": adamw, "make_trunk": Spare}
    model: Any = (
        module(kind=Penalised, **kwargs, **settings) if ours else Taken(counts=True, **kwargs)
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    diary = Diary()
    made = trainer(place, [*METHODS[name](), diary], **({} if ours else settings))
    made.fit(model, Batches(share(batch, place, keys=True) for batch in sparse()))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"start": start, "params": params, "hashes": diary.hashes, "moved": diary.moved}


COMBINATIONS = [
    (host, name, accumulated)
    for host in ("module", "taken over")
    for name in METHODS
    for accumulated in (1, 2)
]

for _combination in COMBINATIONS:
    _host, _name, _accumulated = _combination
    case(
        f"penalty/{_combination}",
        partial(run, host=_host, name=_name, accumulated=_accumulated),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_as_one_process(runs: Any, combination: Any, size: int) -> None:
    (one,) = runs(1, f"penalty/{combination}")
    first, *_ = several = runs(size, f"penalty/{combination}")
    assert deviation(one["params"], one["start"]) > 1e-3
    for found in several:
        assert deviation(found["params"], one["params"]) < 1e-10
        assert found["hashes"] == first["hashes"]
        assert found["moved"] == one["moved"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("host", ["module", "taken over"])
def test_without_it_what_nothing_else_reaches_rests(runs: Any, host: str, size: int) -> None:
    for found in runs(size, f"penalty/{(host, 'F-CAGrad', 1)}"):
        rests = [("encoder.spare" not in moved) for moved in found["moved"][:4]]
        assert rests == [False, True, False, False]
