"""Metrics and losses are those of all processes together."""

import warnings
from functools import partial
from typing import Any

import pytest

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from tests.ddp.cases import case
from tests.ddp.net import Batch, batches, without
from tests.ddp.training import train

pytestmark = pytest.mark.ddp

BASELINES = {"a/accuracy": 0.4, "b/mse": 1.2, "c/mse": 0.9}
METHODS: dict[str, Any] = {
    "plain": list,
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO()],
}


def full() -> list[Batch]:
    return batches(3, seed=1)


def lopsided() -> list[Batch]:
    """Validation labels of "b" with the first process only."""
    made = full()
    for batch in made:
        without(batch, "b", slice(4, 12))
    return made


def partial_train() -> list[Batch]:
    made = batches(3)
    without(made[0], "b", slice(4, 12))
    without(made[1], "a", [0, 1, 7])
    return made


NAMES = [f"full/{name}/nan" for name in METHODS] + ["full/F-CAGrad/keys"]
LOPSIDED = ["lopsided/plain/nan", "lopsided/F-CAGrad/keys"]

for _name in NAMES + LOPSIDED:
    _data, _method, _form = _name.split("/")
    case(
        f"logs/{_name}",
        partial(
            train,
            host="module",
            method=METHODS[_method],
            whole=batches(3) if _data == "full" else partial_train(),
            val=full() if _data == "full" else lopsided(),
            keys=_form == "keys",
            net={"measured": True, "baselines": BASELINES},
        ),
    )

BARS = {"with": BASELINES, "without": None}
for _words, _baselines in BARS.items():
    case(
        f"logs/bar/{_words}",
        partial(
            train,
            host="module",
            method=METHODS["F-CAGrad"],
            whole=batches(3),
            val=full(),
            net={"measured": True, "baselines": _baselines},
            enable_progress_bar=True,
        ),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("words", BARS)
def test_a_progress_bar_in_the_first_process(runs: Any, words: str, size: int) -> None:
    """It asks for metrics of the epoch in that process alone, before the others do."""
    (one,) = runs(1, f"logs/bar/{words}")
    assert ("train/delta_m" in one["metrics"]) is (words == "with")
    for run in runs(size, f"logs/bar/{words}"):
        assert run["metrics"] == pytest.approx(one["metrics"], rel=1e-6, abs=1e-4)


def told(place: Any) -> list[str]:
    """The warnings of a fit in which every process has losses of its own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(place, "taken over", METHODS["F-CAGrad"], batches(2))
    return [str(w.message) for w in caught]


case("logs/told", told, (2,))


def test_a_total_is_compared_with_the_losses_of_its_own_process(runs: Any) -> None:
    for messages in runs(2, "logs/told"):
        assert not [m for m in messages if "sum to" in m]


LOGGED = {
    "val/loss",
    *(f"{stage}/{task}/loss" for stage in ("train", "val") for task in "abc"),
    *(f"{stage}/a/accuracy" for stage in ("train", "val")),
    *(f"{stage}/{task}/mse" for stage in ("train", "val") for task in "bc"),
    "train/loss",
    "train/delta_m",
    "val/delta_m",
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES + LOPSIDED)
def test_as_one_process(runs: Any, name: str, size: int) -> None:
    (one,) = runs(1, f"logs/{name}")
    assert set(one["metrics"]) == LOGGED
    for run in runs(size, f"logs/{name}"):
        found, expected = dict(run["metrics"]), dict(one["metrics"])
        # Metrics are in float32, and delta_m is in percent.
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES + LOPSIDED)
def test_the_loss_of_every_step(runs: Any, name: str, size: int) -> None:
    (one,) = runs(1, f"logs/{name}")
    assert len(set(one["diary"]["losses"])) == 6
    for run in runs(size, f"logs/{name}"):
        assert run["diary"]["losses"] == pytest.approx(one["diary"]["losses"], rel=1e-6)
