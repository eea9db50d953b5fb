"""With SyncBatchNorm several processes are exact also for nets with batch statistics."""

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from tests.ddp.cases import case, caught
from tests.ddp.net import TASKS, Batch, batches, sgd, still, trunk, without
from tests.ddp.training import HOSTS, batch_norm, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

TOLERANCE = 1e-10
SAMS: dict[str, dict[str, Any] | None] = {
    "": None,
    "separate": {"rho": 0.05},
    "joint": {"rho": 0.5, "point": "joint", "adaptive": True},
}


def apart() -> list[Batch]:
    """A task that one process lacks, also in the first batch."""
    made = batches(3)
    without(made[0], "b", slice(6, 12))
    without(made[1], "a", slice(0, 6))
    return made


def nobody() -> list[Batch]:
    made = batches(2)
    for task in TASKS:
        without(made[1], task, slice(6, 12))
    return made


DATA = {"whole": lambda: batches(3), "apart": apart, "nobody": nobody}


def method(sam: str) -> list[Any]:
    settings = SAMS[sam]
    return [CAGrad()] if settings is None else [CAGrad(), TaskSAM(**settings)]


def on_the_cpu() -> Any:
    """DDP does not know that our layers can work there."""
    return patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle")


def normed(
    place: Place, host: str, sam: str, data: str, optimizer: Any = sgd, keys: bool = True
) -> Any:
    layer = batch_norm(place)
    net = {"make_trunk": lambda: trunk(layer(5)), "optimizer": optimizer, "counts": True}
    with on_the_cpu():
        return train(place, host, partial(method, sam), DATA[data](), keys=keys, net=net)


def normed_head(place: Place, host: str, keys: bool) -> Any:
    head = nn.Sequential(nn.Linear(4, 3), batch_norm(place)(3), nn.Linear(3, 2))
    net = {"heads": {"b": head}, "counts": True}
    with on_the_cpu():
        return train(place, host, partial(method, "separate"), apart(), keys=keys, net=net)


CASES = [(host, sam, data) for host in HOSTS for sam in SAMS for data in ("whole", "apart")]
for _host, _sam, _data in CASES:
    case(f"bn/{_host}/{_sam}/{_data}", partial(normed, host=_host, sam=_sam, data=_data))
for _host in HOSTS:
    for _sam in SAMS:
        case(
            f"bn still/{_host}/{_sam}",
            partial(normed, host=_host, sam=_sam, data="apart", optimizer=still),
            sizes=(2,),
        )
REFUSED = [("module", False), ("module", True), ("taken over", True)]
"""Hosts, and whether a task without labels is missing from the targets of a process."""
for _host, _keys in REFUSED:
    case(
        f"bn nobody/{_host}/{_keys}",
        lambda place, host=_host, keys=_keys: caught(
            partial(normed, place, host, "separate", "nobody", keys=keys)
        ),
        sizes=(2,),
    )
    if (_host, _keys) == ("taken over", True):
        continue  # as in plain training, such a layer waits until torch.distributed's time is up
    case(
        f"bn head/{_host}/{_keys}",
        lambda place, host=_host, keys=_keys: caught(partial(normed_head, place, host, keys)),
        sizes=(2,),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("host", "sam", "data"), CASES)
def test_as_batch_norm_in_one_process(runs: Any, host: str, sam: str, data: str, size: int) -> None:
    (one,) = runs(1, f"bn/{host}/{sam}/{data}")
    several = runs(size, f"bn/{host}/{sam}/{data}")
    assert deviation(one["params"], one["start"]) > 1e-3
    for run in several:
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == several[0]["diary"]["hashes"]
        for name, buffer in one["buffers"].items():
            torch.testing.assert_close(run["buffers"][name], buffer, rtol=1e-10, atol=1e-12)
            assert torch.equal(run["buffers"][name], several[0]["buffers"][name])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sam", ["separate", "joint"])
def test_statistics_rest_in_the_second_pass(runs: Any, host: str, sam: str) -> None:
    for with_sam, without_sam in zip(
        runs(2, f"bn still/{host}/{sam}"), runs(2, f"bn still/{host}/"), strict=True
    ):
        assert len(without_sam["buffers"]) == 3
        for name, buffer in without_sam["buffers"].items():
            assert torch.equal(with_sam["buffers"][name], buffer)


@pytest.mark.parametrize(("host", "keys"), REFUSED)
def test_a_process_without_labels_is_refused(runs: Any, host: str, keys: bool) -> None:
    for kind, words in runs(2, f"bn nobody/{host}/{keys}"):
        assert kind == "ProcessError"
        assert "every process needs a label of some task in every batch" in words


@pytest.mark.parametrize(("host", "keys"), REFUSED[:2])
def test_a_head_without_labels_is_refused(runs: Any, host: str, keys: bool) -> None:
    for kind, words in runs(2, f"bn head/{host}/{keys}"):
        assert kind == "ProcessError"
        assert "SyncBatchNorm in the head of task 'b'" in words
