"""Each process goes on with the random numbers that it would have drawn."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import MGDA
from tests.ddp.launch import results
from tests.ddp.net import batches, trunk
from tests.ddp.training import HOSTS, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


class Seeded(pl.Callback):
    """Begins a fit with a seed of the process's own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(self.seed)


def fitted(place: Place, host: str, **settings: Any) -> Any:
    return train(
        place,
        host,
        lambda: [MGDA(), TaskSAM(0.05)],
        batches(4),
        net={"make_trunk": lambda: trunk(nn.Dropout(0.5))},
        max_epochs=3,
        **settings,
    )


def resumed(place: Place) -> dict[Any, Any]:
    found = {}
    for host in HOSTS:
        folder = place.folder / host.replace(" ", "-")
        save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
        more = [Seeded(5 + place.rank), save]
        found[host, "unbroken"] = fitted(place, host, more=more, enable_checkpointing=True)
        path = folder / "epoch=0.ckpt"
        more = [Seeded(50 + place.rank)]
        found[host, "again"] = fitted(place, host, more=more, ckpt_path=path)
        saved = torch.load(path, weights_only=True).get("lightning_flatmtl.random_streams", ())
        found[host, "streams"] = [state["torch"] for state in saved]
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results("tests.ddp.test_random_streams:resumed", 2, tmp_path_factory.mktemp("r"), 120.0)


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_to_the_last_bit(both: Any, host: str) -> None:
    for found in both:
        for key, value in found[host, "unbroken"]["params"].items():
            assert torch.equal(found[host, "again"]["params"][key], value), key
        first, second = found[host, "streams"]
        assert not torch.equal(first, second)
