"""16 bits with a loss scale: an overflow in one process skips the step in all."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, GradNorm
from tests.ddp.cases import case
from tests.ddp.net import Batch, batches, share, trunk
from tests.ddp.training import HOSTS, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

BAD = 1
MARK = 1e3
SCALE = 2.0**10
METHODS: dict[str, Any] = {
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "GradNorm": lambda: [GradNorm(lr=0.1)],
    "F-GradNorm": lambda: [GradNorm(lr=0.1), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}

TRAINED = [name for name in METHODS if name != "GradNorm"]


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


class Loud(nn.Module):
    """Part of a trunk whose backward pass overflows where the forward pass has seen a mark."""

    def forward(self, x: Tensor) -> Tensor:
        return _Loud.apply(x)


class _Loud(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = torch.inf if (x.abs() > MARK).any() else 1.0
        return x.clamp(-MARK, MARK)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.factor


def marked() -> list[Batch]:
    """Float32, one sample that a loud trunk overflows at: it is the last process's."""
    made = overflowing()
    made[BAD][0][-1] = 100 * MARK
    made[BAD][1]["b"][-1] = 0.0
    return made


AT_FEATURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "head": (overflowing, {"gradients": "features"}),
    "trunk": (marked, {"gradients": "features", "make_trunk": lambda: trunk(Loud())}),
}


def half(place: Place, host: str, name: str, data: Any = overflowing, net: Any = None) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return train(
        place,
        host,
        METHODS[name],
        mine=[share(batch, place) for batch in data()],
        more=[Single()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        max_epochs=1,
        net=net,
    )


for _host in HOSTS:
    for _name in TRAINED:
        case(f"overflow/{_host}/{_name}", partial(half, host=_host, name=_name))

for _name in ("CAGrad", "GradNorm"):
    for _where, (_data, _net) in AT_FEATURES.items():
        case(
            f"overflow/features/{_name}/{_where}",
            partial(half, host="module", name=_name, data=_data, net=_net),
        )


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", TRAINED)
def test_all_skip_the_step(runs: Any, host: str, name: str, size: int) -> None:
    (one,) = runs(1, f"overflow/{host}/{name}")
    several = runs(size, f"overflow/{host}/{name}")
    _check(one, several)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("where", AT_FEATURES)
@pytest.mark.parametrize("name", ["CAGrad", "GradNorm"])
def test_all_skip_it_at_the_features_too(runs: Any, name: str, where: str, size: int) -> None:
    (one,) = runs(1, f"overflow/features/{name}/{where}")
    _check(one, runs(size, f"overflow/features/{name}/{where}"))


def _check(one: Any, several: Any) -> None:
    for run in several:
        moved = [bool(names) for names in run["diary"]["moved"]]
        assert moved == [i != BAD for i in range(4)]
        assert run["scale"] == SCALE / 2
        assert run["diary"]["hashes"] == several[0]["diary"]["hashes"]
        assert deviation(run["params"], one["params"]) < 0.02
