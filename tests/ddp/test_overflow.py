"""16 bits with a loss scale: an overflow in one process skips the step in all."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, GradNorm
from tests.ddp.cases import case
from tests.ddp.net import Batch, batches, share
from tests.ddp.training import HOSTS, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

BAD = 1
SCALE = 2.0**10
METHODS: dict[str, Any] = {
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "F-GradNorm": lambda: [GradNorm(lr=0.1), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}


class Single(pl.Callback):
    """Parameters in 32 bits."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.float()


def overflowing() -> list[Batch]:
    """Float32, one sample far beyond what 16 bits hold: it is the last process's."""
    made = [
        (x.float(), {t: y if t == "a" else y.float() for t, y in targets.items()})
        for x, targets in batches(4)
    ]
    made[BAD][1]["b"][-1] = 1e30
    return made


def half(place: Place, host: str, name: str) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return train(
        place,
        host,
        METHODS[name],
        mine=[share(batch, place) for batch in overflowing()],
        more=[Single()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        max_epochs=1,
    )


for _host in HOSTS:
    for _name in METHODS:
        case(f"overflow/{_host}/{_name}", partial(half, host=_host, name=_name))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_all_skip_the_step(runs: Any, host: str, name: str, size: int) -> None:
    (one,) = runs(1, f"overflow/{host}/{name}")
    several = runs(size, f"overflow/{host}/{name}")
    for run in several:
        moved = [bool(names) for names in run["diary"]["moved"]]
        assert moved == [i != BAD for i in range(4)]
        assert run["scale"] == SCALE / 2
        assert run["diary"]["hashes"] == several[0]["diary"]["hashes"]
        assert deviation(run["params"], one["params"]) < 0.02
