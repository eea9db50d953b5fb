"""A job that is broken off and started again goes on as if nothing had happened."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import GradNorm, PCGrad
from tests.ddp.cases import case, caught
from tests.ddp.launch import launch, results
from tests.ddp.net import batches, trunk
from tests.ddp.training import HOSTS, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

PER_EPOCH, EPOCHS, LAST = 5, 3, 9
"""Batches and epochs; the job is broken off in the step after the ninth."""
METHODS: dict[str, Any] = {
    "F-PCGrad": lambda: [PCGrad(), TaskSAM(0.05)],
    "F-GradNorm": lambda: [GradNorm(lr=0.1), TaskSAM(0.5, adaptive=True, point="joint")],
    "F-PCGrad-in-turn": lambda: [PCGrad(), TaskSAM(0.05, refresh=1, perturbation="samo")],
}
COMBINATIONS = [(host, name) for host in HOSTS for name in METHODS]


class Break(pl.Callback):
    """Ends the fit at the beginning of a step."""

    def __init__(self, end: Any) -> None:
        self.end = end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == LAST:
            self.end()


def stop() -> None:
    raise KeyError("broken off")


def killed_in_one(place: Place) -> None:
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def saves(folder: Path) -> list[pl.Callback]:
    return [
        ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2),
        ModelCheckpoint(folder, "epoch-{step}", save_top_k=-1, every_n_epochs=1),
    ]


def fitted(place: Place, host: str, name: str, norm: bool = True, **settings: Any) -> Any:
    between = (lambda: [nn.BatchNorm1d(5)]) if norm else list
    return train(
        place,
        host,
        METHODS[name],
        batches(PER_EPOCH),
        net={"make_trunk": lambda: trunk(*between())},
        max_epochs=EPOCHS,
        enable_checkpointing="more" in settings,
        **settings,
    )


def folder_of(place: Place, host: str, name: str) -> Path:
    return place.folder / f"{host}-{name}".replace(" ", "-")


def broken(place: Place) -> None:
    """Fits that are broken off one after the other; the last one by a kill."""
    for host, name in COMBINATIONS:
        last = (host, name) == COMBINATIONS[-1]
        end = partial(killed_in_one, place) if last else stop
        more = [Break(end), *saves(folder_of(place, host, name))]
        run = partial(fitted, place, host, name, more=more)
        if last:
            run()
        else:
            assert caught(run)[0] == "KeyError"


def resumed(place: Place) -> dict[Any, Any]:
    found = {}
    for host, name in COMBINATIONS:
        folder = folder_of(place, host, name)
        found[host, name, "unbroken"] = fitted(place, host, name)
        found[host, name, "step"] = fitted(
            place, host, name, ckpt_path=folder / f"step={LAST - 1}.ckpt"
        )
        found[host, name, "epoch"] = fitted(
            place, host, name, ckpt_path=folder / f"epoch-step={PER_EPOCH}.ckpt"
        )
    return found


@pytest.fixture(scope="module")
def after_the_break(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("restarts")
    other, killed = launch("tests.ddp.test_restarts:broken", 2, folder, 60.0, retry=False)
    assert killed.code == -signal.SIGKILL, killed.output
    assert other.code not in (None, 0), other.output
    return results("tests.ddp.test_restarts:resumed", 2, folder, 60.0)


@pytest.mark.parametrize(("host", "name"), COMBINATIONS)
@pytest.mark.parametrize("since", ["step", "epoch"])
def test_the_same_to_the_last_bit(after_the_break: Any, host: str, name: str, since: str) -> None:
    for found in after_the_break:
        unbroken, again = found[host, name, "unbroken"], found[host, name, since]
        assert again["steps"] == unbroken["steps"] == PER_EPOCH * EPOCHS
        for kind in ("params", "buffers"):
            for key, value in unbroken[kind].items():
                assert torch.equal(again[kind][key], value), key
        assert deviation(unbroken["params"], unbroken["start"]) > 1e-3


# Two processes begin, one or three go on.


def unbroken(place: Place, host: str, name: str) -> Any:
    more = saves(folder_of(place, host, name)) if place.size == 2 else []
    settings = {"more": more} if more else {}
    return fitted(place, host, name, norm=False, **settings)


def other_size(place: Place, host: str, name: str) -> Any:
    path = folder_of(place, host, name) / f"step={LAST - 1}.ckpt"
    return fitted(place, host, name, norm=False, ckpt_path=path)


for _host, _name in COMBINATIONS:
    _words = {"host": _host, "name": _name}
    case(f"restarts/begun/{_host}/{_name}", partial(unbroken, **_words), sizes=(1, 2))
    case(f"restarts/gone on/{_host}/{_name}", partial(other_size, **_words), sizes=(1, 3))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("host", "name"), COMBINATIONS)
def test_with_another_number_of_processes(runs: Any, host: str, name: str, size: int) -> None:
    (one,) = runs(1, f"restarts/begun/{host}/{name}")
    for run in runs(size, f"restarts/gone on/{host}/{name}"):
        assert run["steps"] == one["steps"]
        assert deviation(run["params"], one["params"]) < 1e-10
