"""Accumulated batches over several processes train as one large batch in one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import (
    FAMO,
    IMTL,
    MGDA,
    CAGrad,
    GradDrop,
    NashMTL,
    PCGrad,
    UPGrad,
)
from tests.ddp.cases import case
from tests.ddp.net import Batch, batches, share, without
from tests.ddp.training import HOSTS, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

TOLERANCE = 1e-10
PLAIN: dict[str, Callable[[], list[pl.Callback]]] = {
    "MGDA": lambda: [MGDA()],
    "PCGrad": lambda: [PCGrad(seed=7)],
    "CAGrad": lambda: [CAGrad()],
    "NashMTL": lambda: [NashMTL()],
    "UPGrad": lambda: [UPGrad()],
    "IMTL": lambda: [IMTL(lr=0.1)],
    "GradDrop": lambda: [GradDrop(seed=3)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}
FLAT: dict[str, Callable[[], list[pl.Callback]]] = {
    "separate": lambda: [CAGrad(), TaskSAM(0.1)],
    "joint": lambda: [CAGrad(), TaskSAM(0.5, point="joint", adaptive=True)],
    "direct": lambda: [PCGrad(seed=1), TaskSAM(0.1, aggregate="direct")],
    "second": lambda: [MGDA(), TaskSAM(0.1, aggregate="second")],
    "columns": lambda: [GradDrop(seed=3), TaskSAM(0.1)],
}


def partly() -> list[Batch]:
    """Batches of twelve, whose halves have other numbers of labels in every process."""
    made = batches(3)
    without(made[0], "a", [1, 2, 7])
    without(made[0], "b", [0, 4, 5, 8, 11])
    without(made[1], "b", slice(0, 6))  # none in the first half
    without(made[1], "c", slice(6, 12))
    without(made[2], "a", slice(None))  # in no half
    for task in "abc":
        without(made[2], task, slice(6, 12))  # nothing at all in the second half
    return made


def halves(whole: list[Batch]) -> list[Batch]:
    return [
        (x[rows], {task: y[rows] for task, y in targets.items()})
        for x, targets in whole
        for rows in (slice(0, 6), slice(6, 12))
    ]


def accumulated(place: Place, host: str, method: Any, sent: bool = False) -> dict[str, Any]:
    mine = [share(batch, place) for batch in halves(partly())]
    counted = _count_sums() if sent else None
    found = train(
        place,
        host,
        method,
        mine=mine,
        net={"counts": True},
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    return {**found, "rows sent": None if counted is None else counted()}


def _count_sums() -> Callable[[], int]:
    """Counts the rows that are sent from now on."""
    original, calls = dist.reduce_scatter_tensor, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.reduce_scatter_tensor = noted

    def finish() -> int:
        dist.reduce_scatter_tensor = original
        return len(calls)

    return finish


def _name(*words: str) -> str:
    return "accumulation/" + "/".join(words)


for _host in HOSTS:
    for _method, _make in PLAIN.items():
        _settings = {"host": _host, "method": _make}
        case(
            _name(_host, _method),
            partial(accumulated, sent=_method == "CAGrad", **_settings),
            (2,),
        )
        _large = {"whole": partly(), "net": {"counts": True}, "max_epochs": 1}
        case(_name(_host, _method, "large"), partial(train, **_settings, **_large), (1,))
    for _method, _make in FLAT.items():
        _run = partial(accumulated, host=_host, method=_make)
        case(_name(_host, _method), _run, (1, 2))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", PLAIN)
def test_as_one_large_batch_in_one_process(runs: Any, host: str, method: str) -> None:
    (large,) = runs(1, _name(host, method, "large"))
    first, *_ = several = runs(2, _name(host, method))
    assert deviation(large["params"], large["start"]) > 1e-2
    for run in several:
        assert run["steps"] == large["steps"] == 3
        assert deviation(run["params"], large["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == first["diary"]["hashes"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", FLAT)
def test_flat_updates_as_one_process(runs: Any, host: str, method: str) -> None:
    (one,) = runs(1, _name(host, method))
    first, *_ = several = runs(2, _name(host, method))
    assert deviation(one["params"], one["start"]) > 1e-2
    for run in several:
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == first["diary"]["hashes"]


@pytest.mark.parametrize("host", HOSTS)
def test_rows_are_sent_once_for_an_update(runs: Any, host: str) -> None:
    for run in runs(2, _name(host, "CAGrad")):
        assert run["rows sent"] == 3 + 3 + 2  # the last update lacks a task
