"""The cheaper second passes over several processes: as one process with all of the data."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad, GradDrop
from tests.ddp.cases import case
from tests.ddp.net import Batch, batches, without
from tests.ddp.test_exactness import Whitened
from tests.ddp.training import HOSTS, deviation, train

pytestmark = pytest.mark.ddp

TOLERANCE = 1e-10
SAMS: dict[str, dict[str, Any]] = {
    "refresh": {"refresh": 1},
    "refresh joint": {"refresh": 2, "point": "joint", "adaptive": True, "rho": 0.5},
    "refresh each": {"refresh": 1, "aggregate": "each"},
    "common": {"perturbation": "common"},
    "common joint": {"perturbation": "common", "point": "joint", "adaptive": True, "rho": 0.5},
    "common refresh": {"perturbation": "common", "refresh": 1},
    "samo": {"perturbation": "samo"},
    "samo published": {"perturbation": "samo", "aggregate": "direct", "point": "joint"},
    "samo refresh": {"perturbation": "samo", "refresh": 1, "adaptive": True, "rho": 0.5},
    "host": {"rows": "cpu", "refresh": 1, "start": 0.3, "rho_warmup": 2},
}
OTHERS = {"columns": GradDrop, "whole matrix": Whitened}


def method(make: Any, sam: str) -> list[Any]:
    return [make(), TaskSAM(**{"rho": 0.05, **SAMS[sam]})]


def gaps() -> list[Batch]:
    """Batches of twelve in which tasks are absent, here and there or everywhere."""
    made = batches(7)
    without(made[0], "a", [1, 2, 7])
    without(made[1], "b", slice(None))
    without(made[2], "c", slice(0, 6))
    without(made[3], "a", slice(6, 12))
    without(made[4], "c", slice(None))
    return made


SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"whole": batches(3), "max_epochs": 2},
    "gaps": {"whole": gaps(), "max_epochs": 1, "net": {"counts": True}},
    "accumulated": {
        "whole": gaps(),
        "max_epochs": 1,
        "net": {"counts": True},
        "accumulate_grad_batches": 3,
    },
}
COMBINATIONS = [
    *((host, "CAGrad", sam, "whole") for host in HOSTS for sam in SAMS),
    *(("module", "CAGrad", sam, kind) for sam in SAMS for kind in ("gaps", "accumulated")),
    *(("taken over", name, sam, "gaps") for name in OTHERS for sam in ("refresh", "host")),
]


def _name(*words: str) -> str:
    return "cheap flatness/" + "/".join(words)


for _host, _method, _sam, _kind in COMBINATIONS:
    _make = OTHERS.get(_method, CAGrad)
    case(
        _name(_host, _method, _sam, _kind),
        partial(train, host=_host, method=partial(method, _make, _sam), **SETTINGS[_kind]),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("host", "name", "sam", "kind"), COMBINATIONS)
def test_as_one_process(runs: Any, host: str, name: str, sam: str, kind: str, size: int) -> None:
    (one,) = runs(1, _name(host, name, sam, kind))
    several: Sequence[Any] = runs(size, _name(host, name, sam, kind))
    assert deviation(one["params"], one["start"]) > 1e-3
    for run in several:
        assert run["steps"] == one["steps"] == {"whole": 6, "gaps": 7, "accumulated": 3}[kind]
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == several[0]["diary"]["hashes"]
