"""All processes have the same parameters after every step, bit for bit."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, GradDrop, PCGrad
from tests.ddp.cases import case
from tests.ddp.net import adamw, batches, trunk
from tests.ddp.training import HOSTS, digest, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

STEPS = 50
METHODS: dict[str, Any] = {
    "PCGrad": lambda: [PCGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "F-GradDrop, local": lambda: [
        GradDrop(),
        TaskSAM(0.5, adaptive=True, point="joint", perturbation="local"),
    ],
    "FAMO": lambda: [FAMO()],
}


def noisy() -> nn.Module:
    return trunk(nn.BatchNorm1d(5), nn.Dropout(0.2))


def drifting(place: Place, host: str, method: Any) -> dict[str, Any]:
    return train(
        place,
        host,
        method,
        batches(10),
        seed=100 + place.rank,
        net={"make_trunk": noisy, "optimizer": adamw},
        max_epochs=STEPS // 10,
    )


CASES: Sequence[tuple[str, str]] = [
    ("module", "plain"),
    *((host, name) for host in HOSTS for name in METHODS),
]
for _host, _name in CASES:
    case(
        f"drift/{_host}/{_name}",
        partial(drifting, host=_host, method=METHODS.get(_name, list)),
        sizes=(2, 3) if _name == "F-CAGrad" else (2,),
    )


@pytest.mark.parametrize(
    ("host", "name", "size"),
    [(*words, 2) for words in CASES] + [(host, "F-CAGrad", 3) for host in HOSTS],
)
def test_parameters(runs: Any, host: str, name: str, size: int) -> None:
    first, *others = runs(size, f"drift/{host}/{name}")
    hashes = first["diary"]["hashes"]
    assert len(set(hashes)) == STEPS
    for other in others:
        assert other["diary"]["hashes"] == hashes
        assert digest(other["params"].values()) == hashes[-1]
        same = {n: torch.equal(b, first["buffers"][n]) for n, b in other["buffers"].items()}
        assert len(same) == 3
        # Automatic optimization shares them before a pass, a MultiTaskModule after a step too.
        assert host != "module" or all(same.values()), same
