"""SharpnessMonitor sees the losses of all processes' samples, and only looks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import SharpnessMonitor
from tests.ddp.cases import Caught, case, caught
from tests.ddp.net import Batches, batches, module, share, still, without
from tests.ddp.training import HOSTS, train, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

EXACTLY = {"top_eigenvalue": True, "iterations": 500, "tolerance": 1e-5}

METHODS: dict[str, tuple[Callable[[], list[pl.Callback]], dict[str, Any]]] = {
    "none": (list, EXACTLY),
    "CAGrad": (lambda: [CAGrad()], {"adaptive": True, "rho": 0.5}),
    "F-CAGrad": (lambda: [CAGrad(), TaskSAM(0.05)], {}),
    "F-LS, joint": (lambda: [TaskSAM(0.05, point="joint", adaptive=True)], EXACTLY),
    "F-LS, own": (lambda: [TaskSAM(0.05)], {"own": True, "rho": 0.2}),
}


def looked_at(method: str) -> list[pl.Callback]:
    callbacks, settings = METHODS[method]
    return [*callbacks(), SharpnessMonitor(2, **settings)]


NAMES = [f"{host}/{method}" for host in HOSTS for method in METHODS if method != "F-LS, own"]
for _name in NAMES:
    _host, _method = _name.split("/")
    _case = partial(train, host=_host, whole=batches(3))
    case(f"sharpness/{_name}/with", partial(_case, method=partial(looked_at, _method)), (1, 2))
    case(f"sharpness/{_name}/without", partial(_case, method=METHODS[_method][0]), (2,))


def figures(run: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in run["metrics"].items() if k.startswith("sharpness/")}


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_those_of_one_process(runs: Any, name: str) -> None:
    (one,) = runs(1, f"sharpness/{name}/with")
    first, second = map(figures, runs(2, f"sharpness/{name}/with"))
    assert first == second
    assert first == pytest.approx(figures(one), rel=1e-6)
    assert {"sharpness/a", "sharpness/epoch/c"} <= first.keys()
    curved = "sharpness/b/top_eigenvalue" in first
    assert curved is (METHODS[name.split("/")[1]][1] == EXACTLY)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same_bit_for_bit(runs: Any, name: str) -> None:
    with_it, without_it = (runs(2, f"sharpness/{name}/{kind}") for kind in ("with", "without"))
    for found, expected in zip(with_it, without_it, strict=True):
        for key, value in expected["params"].items():
            assert torch.equal(found["params"][key], value), key


def partial_labels() -> Any:
    """Five samples here and three there; no label of "b" here, and of "c" there."""
    whole = batches(2, rows=8)
    for batch in whole:
        without(batch, "b", slice(0, 5))
        without(batch, "c", slice(5, 8))
        without(batch, "a", slice(2, 4))
    return whole


PARTIAL = ["CAGrad", "F-CAGrad", "F-LS, joint", "F-LS, own"]
for _host in HOSTS:
    for _method in PARTIAL:
        _net = {"optimizer": still, **({} if _host == "module" else {"counts": True})}
        _case = partial(train, host=_host, whole=partial_labels(), net=_net)
        _case = partial(_case, method=partial(looked_at, _method))
        case(f"sharpness/partial/{_host}/{_method}", _case, (1, 2))


@pytest.mark.parametrize("method", PARTIAL)
@pytest.mark.parametrize("host", HOSTS)
def test_the_samples_with_a_label_count(runs: Any, host: str, method: str) -> None:
    (one,) = runs(1, f"sharpness/partial/{host}/{method}")
    first, second = map(figures, runs(2, f"sharpness/partial/{host}/{method}"))
    assert first == second
    assert first == pytest.approx(figures(one), rel=1e-6)
    assert {"sharpness/a", "sharpness/b", "sharpness/c"} <= first.keys()


def validated(place: Place, uneven: bool = False) -> dict[str, Any]:
    """Batches of halves, either all in one process or a part of them in each of two."""
    halves = [share(batch, Place(rank, 2, place.folder)) for batch in batches(3) for rank in (0, 1)]
    cut = 4 if uneven else 3
    if place.size == 2:
        halves = halves[:cut] if place.rank == 0 else halves[cut:]
    mine = [share(batch, place) for batch in batches(1)]
    made = trainer(place, [SharpnessMonitor(data="val", rho=0.1, **EXACTLY)], max_epochs=1)
    made.fit(module(still), Batches(mine), Batches(halves))
    return {"metrics": {k: float(v) for k, v in made.callback_metrics.items()}}


case("sharpness/val/even", validated, (1, 2))
case("sharpness/val/uneven", partial(validated, uneven=True), (2,))


@pytest.mark.parametrize("kind", ["even", "uneven"])
def test_a_validation_is_that_of_all_batches(runs: Any, kind: str) -> None:
    (one,) = runs(1, "sharpness/val/even")
    first, second = map(figures, runs(2, f"sharpness/val/{kind}"))
    assert first == second
    assert first == pytest.approx(figures(one), rel=1e-6)
    assert len(first) == 6


class Stumbles(MultiTaskModule):
    """The last process fails where it is looked at, at the third time."""

    runs = 0

    def losses(self, batch: Any, batch_idx: int) -> Any:
        if self.second_pass and dist.get_rank() == dist.get_world_size() - 1:
            Stumbles.runs += 1
            if Stumbles.runs == AT["run"]:
                raise LookupError("the third page is missing")
        return super().losses(batch, batch_idx)


AT = {"run": 0}
RUNS = {"loss": 1, "gradient": 2, "perturbed": 3, "Hessian": 4}


def stumbling(place: Place, at: str) -> Caught:
    Stumbles.runs, AT["run"] = 0, RUNS[at]
    looks = SharpnessMonitor(1, top_eigenvalue=True)
    net = {"kind": Stumbles, "optimizer": still}
    job = partial(train, place, "module", lambda: [looks], whole=batches(1), net=net)
    return caught(job)


for _at in RUNS:
    case(f"sharpness/told/{_at}", partial(stumbling, at=_at), (2,))


@pytest.mark.parametrize("at", RUNS)
def test_an_error_of_one_process_is_told(runs: Any, at: str) -> None:
    first, second = runs(2, f"sharpness/told/{at}")
    assert second.kind == "LookupError"
    assert first.kind == "ProcessError"
    assert "process 1: LookupError: the third page is missing" in first.words
