"""Loaders that take turns, over processes: the same tasks, other samples, the same net."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.data import TaskLoader
from tests.data.test_task_loader import Diary, samples
from tests.ddp.cases import case
from tests.ddp.training import trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

ORDERS = ("round_robin", "proportional", "temperature")
SIZES = {"small": 24, "large": 96}
BATCH = 12  # over all processes
STEPS = 10


def loaders(place: Place) -> dict[str, DataLoader]:
    made = {}
    for number, (task, size) in enumerate(SIZES.items()):
        data = samples(size, number)
        # What Lightning puts in for several processes, for one.
        sampler = DistributedSampler(data, 1, 0, shuffle=True) if place.size == 1 else None
        shuffle = None if place.size == 1 else True
        made[task] = DataLoader(data, BATCH // place.size, shuffle, sampler=sampler)
    return made


def fit(place: Place, order: Any) -> Any:
    torch.manual_seed(0)
    module = MultiTaskModule(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh()),
        [Task(t, nn.Linear(6, 1), nn.MSELoss()) for t in SIZES],
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
        accumulate_grad_batches=2,
    ).double()
    diary = Diary()
    settings: dict[str, Any] = {"temperature": 3.0} if order == "temperature" else {}
    fitted = trainer(place, [diary, CAGrad(), TaskSAM(0.05)], use_distributed_sampler=True)
    fitted.fit(module, TaskLoader(loaders(place), order, steps=STEPS, **settings))
    return {
        "steps": diary.steps,
        "parameters": [p.detach().clone() for p in module.parameters()],
        "updates": fitted.global_step,
    }


for order in ORDERS:
    case(f"in turn, {order}", lambda place, order=order: fit(place, order), sizes=(1, 2))


@pytest.mark.parametrize("order", ORDERS)
def test_two_processes_draw_the_same_tasks_and_other_samples(runs: Any, order: str) -> None:
    (one,) = runs(1, f"in turn, {order}")
    first, second = runs(2, f"in turn, {order}")
    assert len(one["steps"]) == len(first["steps"]) == 2 * STEPS
    for whole, left, right in zip(one["steps"], first["steps"], second["steps"], strict=True):
        assert set(whole) == set(left) == set(right)
        for task, values in whole.items():
            assert not set(left[task]) & set(right[task])
            assert sorted(left[task] + right[task]) == sorted(values)


@pytest.mark.parametrize("order", ORDERS)
def test_two_processes_train_what_one_trains(runs: Any, order: str) -> None:
    (one,) = runs(1, f"in turn, {order}")
    for rank in runs(2, f"in turn, {order}"):
        assert rank["updates"] == one["updates"] == STEPS
        for mine, theirs in zip(rank["parameters"], one["parameters"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
