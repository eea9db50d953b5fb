"""An encoder that is thawed in the middle of a fit is trained by all processes together."""

from functools import partial
from typing import Any

import pytest
from lightning.pytorch.callbacks import BackboneFinetuning

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from tests.ddp.cases import case
from tests.ddp.net import batches
from tests.ddp.training import deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

METHODS: dict[str, Any] = {
    "plain": list,
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
}
PER_EPOCH = 3


def _twice(epoch: int) -> float:
    return 2.0


def fit(place: Place, name: str) -> Any:
    return train(
        place,
        "module",
        lambda: [BackboneFinetuning(1, lambda_func=_twice), *METHODS[name]()],
        batches(PER_EPOCH),
        max_epochs=3,
    )


for name in METHODS:
    case(f"thawed, {name}", partial(fit, name=name), sizes=(1, 2))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_trains(runs: Any, name: str) -> None:
    (one,) = runs(1, f"thawed, {name}")
    several = runs(2, f"thawed, {name}")
    moved = one["diary"]["moved"]
    encoder = {n for n in one["params"] if n.startswith("encoder.")}
    assert not moved[0] & encoder
    assert moved[PER_EPOCH] >= encoder
    for rank in several:
        assert rank["diary"]["hashes"] == several[0]["diary"]["hashes"]  # no drift
        assert deviation(rank["params"], one["params"]) < 1e-10
