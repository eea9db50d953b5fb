"""A resumed run equals an unbroken one to the last bit, with dropout and shuffled data too."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, MGDA, GradNorm
from tests.helpers import assert_identical, data, fit, module
from tests.hosts import HOSTS, Foreign, smooth_trunk

METHODS: dict[str, Any] = {
    "MGDA": lambda: [MGDA()],
    "F-GradNorm": lambda: [GradNorm(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO()],
    "F-MGDA in turn": lambda: [MGDA(), TaskSAM(0.05, refresh=1)],
    "F-MGDA in turn, SAMO, 16 bits": lambda: [
        MGDA(),
        TaskSAM(0.05, refresh=1, perturbation="samo", rows="bfloat16"),
    ],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]
KEY = "lightning_flatmtl.random_streams"


class Noisy(nn.Module):
    """Dropout, and noise from the generators of Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = smooth_trunk(dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (1.0 + 0.1 * random.random()) + 0.1 * float(np.random.rand())


def shuffled() -> DataLoader:
    return DataLoader(data().dataset, batch_size=8, shuffle=True)


def made(host: str) -> Any:
    if host == "module":
        return module(trunk=Noisy())
    return Validated(module(trunk=Noisy()))


class Validated(Foreign):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", sum(self.losses(batch).values()))


def seeded(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)
    np.random.seed(n)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("validated", [False, True], ids=["alone", "validated"])
def test_goes_on_to_the_last_bit(host: str, name: str, validated: bool, tmp_path: Path) -> None:
    val = data(seed=5) if validated else None
    unbroken, resumed = made(host), made(host)
    seeded(11)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    callbacks = [*METHODS[name](), keep]
    fit(unbroken, callbacks, shuffled(), val, max_epochs=4, enable_checkpointing=True)
    seeded(12)
    again = ModelCheckpoint(tmp_path / "again", "{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(
        resumed,
        [*METHODS[name](), again],
        shuffled(),
        val,
        ckpt_path=tmp_path / "epoch=1.ckpt",
        max_epochs=4,
        enable_checkpointing=True,
    )
    assert_identical(resumed, unbroken)


@pytest.mark.parametrize("host", HOSTS)
def test_what_was_saved_after_the_fit_goes_on_too(host: str, tmp_path: Path) -> None:
    unbroken, broken, resumed = made(host), made(host), made(host)
    seeded(11)
    fit(unbroken, [MGDA()], shuffled(), max_epochs=4)
    seeded(11)
    fit(broken, [MGDA()], shuffled(), max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    seeded(12)
    fit(resumed, [MGDA()], shuffled(), ckpt_path=tmp_path / "two.ckpt", max_epochs=4)
    assert_identical(resumed, unbroken)


@pytest.mark.parametrize("host", HOSTS)
def test_without_a_checkpoint_to_resume_from_the_streams_are_left_alone(
    host: str, tmp_path: Path
) -> None:
    class Draws(pl.Callback):
        """Notes what the streams give when training begins."""

        def on_train_start(self, trainer, pl_module):
            self.drawn = [torch.rand(1).item(), random.random(), np.random.rand()]

    first, second, third = Draws(), Draws(), Draws()
    seeded(1)
    fit(made(host), [MGDA(), first]).save_checkpoint(tmp_path / "one.ckpt")
    by = [MGDA(), second]
    seeded(2)
    fit(made(host), by)
    seeded(2)
    net = made(host)
    net.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    trainer = fit(net, [MGDA(), third])
    assert second.drawn != first.drawn
    assert third.drawn == second.drawn
    state = [torch.get_rng_state().clone(), random.getstate()]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.parametrize("host", HOSTS)
def test_streams_of_another_number_of_processes_are_left_out(host: str, tmp_path: Path) -> None:
    fit(made(host), [MGDA()]).save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert len(checkpoint[KEY]) == 1
    checkpoint[KEY] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    seeded(3)
    before = random.getstate()
    fit(made(host), [MGDA()], ckpt_path=tmp_path / "two.ckpt", max_epochs=1)
    assert random.getstate() == before
