"""Samples without a label, on one process or on all: every loss is the mean of those that have."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, GradDrop, GradNorm, PCGrad
from tests.ddp.cases import case
from tests.ddp.net import TASKS, Batch, adamw, batches, trunk, without
from tests.ddp.training import HOSTS, deviation, train

pytestmark = pytest.mark.ddp

TOLERANCE = 1e-10
METHODS: dict[str, Any] = {
    "plain": list,
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "F-PCGrad": lambda: [PCGrad(), TaskSAM(0.5, point="joint", adaptive=True)],
    "GradDrop": lambda: [GradDrop()],
    "GradNorm": lambda: [GradNorm(lr=0.1)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}
ABSENT, EMPTY = 2, 4
"""The batch in which no process has task "c", and the one in which none has any label."""


def sparse() -> list[Batch]:
    """With two processes of six samples each, or three of four."""
    made = batches(6)
    without(made[0], "b", slice(6, 12))  # the first batch: not in the last process
    without(made[1], "a", slice(0, 6))
    without(made[1], "b", [1, 2, 5, 8])  # some in every process
    without(made[ABSENT], "c", slice(None))
    for task in TASKS:
        without(made[3], task, slice(6, 12))  # the last process has nothing
        without(made[EMPTY], task, slice(None))
    return made


def apart() -> list[Batch]:
    """In the first batch every process sees a task of its own, and "c" comes later."""
    made = batches(3)
    without(made[0], "a", slice(6, 12))
    without(made[0], "b", slice(0, 6))
    without(made[0], "c", slice(None))
    without(made[1], "c", slice(0, 6))
    return made


class Spare(nn.Module):
    """A trunk with a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trunk()
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


DATA = {"sparse": sparse, "apart": apart, "uneven": lambda: batches(3, [12, 12, 8])}
COMBINATIONS = [
    *((host, name, "sparse", 1, 1) for host in HOSTS for name in METHODS),
    *((host, "F-CAGrad", "sparse", 0, 1) for host in HOSTS),
    *((host, name, "sparse", 1, 2) for host in HOSTS for name in ("F-CAGrad", "GradNorm")),
    *((host, "F-CAGrad", "apart", 1, 1) for host in HOSTS),
    *((host, name, "uneven", 1, 1) for host in HOSTS for name in ("F-CAGrad", "F-PCGrad", "FAMO")),
    ("module", "plain", "sparse", 1, 2),
    ("module", "plain", "uneven", 1, 1),
]
# Without a callback nobody weighs the losses of an ordinary module.
COMBINATIONS = [c for c in COMBINATIONS if c[:2] != ("taken over", "plain")]


def _name(host: str, name: str, data: str, keys: int, accumulated: int) -> str:
    return f"labels/{host}/{name}/{data}/{'keys' if keys else 'nan'}/{accumulated}"


for _combination in COMBINATIONS:
    _host, _method, _data, _keys, _accumulated = _combination
    case(
        _name(*_combination),
        partial(
            train,
            host=_host,
            method=METHODS[_method],
            whole=DATA[_data](),
            keys=bool(_keys),
            net={"optimizer": adamw, "make_trunk": Spare, "counts": True},
            accumulate_grad_batches=_accumulated,
        ),
    )


case(
    "labels/silent",
    partial(
        train,
        host="taken over",
        method=METHODS["F-CAGrad"],
        whole=sparse(),
        keys=True,
        net={"optimizer": adamw, "make_trunk": Spare, "counts": True, "silent": True},
    ),
)


AT_FEATURES = [("CAGrad", 0), ("CAGrad", 1), ("GradNorm", 1)]
for _method, _keys in AT_FEATURES:
    case(
        f"labels/features/{_method}/{_keys}",
        partial(
            train,
            host="module",
            method=METHODS[_method],
            whole=sparse(),
            keys=bool(_keys),
            net={"optimizer": adamw, "make_trunk": Spare, "gradients": "features"},
        ),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "keys"), AT_FEATURES)
def test_gradients_at_the_features(runs: Any, name: str, keys: int, size: int) -> None:
    (one,) = runs(1, f"labels/features/{name}/{keys}")
    first, *_ = several = runs(size, f"labels/features/{name}/{keys}")
    assert deviation(one["params"], one["start"]) > 1e-3
    for run in several:
        assert run["steps"] == one["steps"]
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == first["diary"]["hashes"]
        assert run["diary"]["moved"] == one["diary"]["moved"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_that_returns_nothing(runs: Any, size: int) -> None:
    (one,) = runs(1, _name("taken over", "F-CAGrad", "sparse", 1, 1))
    for run in runs(size, "labels/silent"):
        assert deviation(run["params"], one["params"]) < TOLERANCE


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: _name(*c)[7:])
def test_as_one_process(runs: Any, combination: Any, size: int) -> None:
    (one,) = runs(1, _name(*combination))
    first, *_ = several = runs(size, _name(*combination))
    assert deviation(one["params"], one["start"]) > 1e-3
    for run in several:
        assert run["steps"] == one["steps"]
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == first["diary"]["hashes"]
        assert run["diary"]["owners"] == first["diary"]["owners"]
        assert run["diary"]["moved"] == one["diary"]["moved"]
        # Weight decay leaves alone what no loss reaches.
        assert torch.equal(run["params"]["encoder.spare"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "combination",
    [c for c in COMBINATIONS if c[2::2] == ("sparse", 1)],
    ids=lambda c: _name(*c)[7:],
)
def test_an_absent_head_rests(runs: Any, combination: Any, size: int) -> None:
    for run in runs(size, _name(*combination)):
        for epoch in range(2):
            moved = run["diary"]["moved"][6 * epoch : 6 * (epoch + 1)]
            assert not any(n.startswith("heads.c") for n in moved[ABSENT])
            assert any(n.startswith("heads.b") for n in moved[ABSENT])
            assert not moved[EMPTY]
            assert any(n.startswith("heads.c") for n in moved[0])
        # Automatic optimization counts a step for a batch that had nothing.
        assert run["steps"] == (10 if combination[0] == "module" else 12)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [2, 3])
def test_tasks_seen_apart_share_the_trunk(runs: Any, host: str, size: int) -> None:
    for run in runs(size, _name(host, "F-CAGrad", "apart", 1, 1)):
        for owners in run["diary"]["owners"]:
            trunk_owners = [v for n, v in owners["owners"].items() if n.startswith("encoder.net")]
            assert trunk_owners == [None] * 4
