"""Calibration has the figures of all processes' samples, and only looks."""

import csv
from functools import partial
from typing import Any

import pytest
import torch

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import Calibration
from tests.ddp.cases import Caught, case, caught
from tests.ddp.net import Batch, Batches, Foreign, batches, module, share, without
from tests.ddp.training import HOSTS, copies, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

OUTSIDE = 4 * torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Labelled(Foreign):
    """Returns what it predicts, of the tasks that have labels."""

    def forward(self, x: Any) -> Any:
        features = self.encoder(x)
        return {task: head(features) for task, head in self.heads.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        x, targets = batch
        return {"logits": self(x), "targets": targets}


def whole_validation() -> list[Batch]:
    """Eight samples and twelve; processes have unequal shares of the former."""
    val = batches(4, rows=[8, 12, 8, 12], seed=1)
    without(val[0], "a", slice(2, 6))
    return val


def run(
    place: Place, host: str, looks: bool, alone: bool = False, bad: bool = False
) -> dict[str, Any]:
    """Train, with validation on this process's share.

    Args:
        place: The process.
        host: Which module.
        looks: Whether there is a Calibration.
        alone: Whether only the first process has labels of task "a".
        bad: Whether the last process has a label of no class.
    """
    net = module() if host == "module" else Labelled()
    val = whole_validation()
    if alone:
        for x, targets in val:
            targets["a"][len(x) * 5 // 8 if len(x) == 8 else len(x) // 2 :] = -1
    mine = [share(batch, place, keys=alone) for batch in val]
    if bad and place.rank == place.size - 1:
        mine[1][1]["a"][0] = 7
    name = f"{host.replace(' ', '_')}_{place.size}_{alone}.csv"
    file = place.folder / name
    calibration = [Calibration(["a"] if bad else None, ood=[OUTSIDE], csv=file)] if looks else []
    made = trainer(place, [CAGrad(), *calibration])
    made.fit(net, Batches(share(batch, place) for batch in batches(3)), Batches(mine))
    rows = []
    if looks and place.rank == 0:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
    return {
        "rows": rows,
        "params": copies(net.named_parameters()),
        "metrics": {k: float(v) for k, v in made.callback_metrics.items()},
    }


for _host in HOSTS:
    _case = partial(run, host=_host)
    case(f"calibration/{_host}/with", partial(_case, looks=True), (1, 2))
    case(f"calibration/{_host}/without", partial(_case, looks=False), (2,))
    case(f"calibration/{_host}/alone", partial(_case, looks=True, alone=True), (1, 2))


def _refused(place: Place) -> Caught:
    # The loss of the other host refuses the label itself.
    return caught(partial(run, place, "taken over", looks=True, bad=True))


case("calibration/bad", _refused, (2,))


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in found["metrics"].items() if k.startswith("calibration/")}


@pytest.mark.parametrize("kind", ["with", "alone"])
@pytest.mark.parametrize("host", HOSTS)
def test_the_figures_are_those_of_one_process(runs: Any, host: str, kind: str) -> None:
    (one,) = runs(1, f"calibration/{host}/{kind}")
    first, second = runs(2, f"calibration/{host}/{kind}")
    assert figures(first) == figures(second)
    assert figures(first) == pytest.approx(figures(one), rel=1e-6, abs=1e-6)
    names = {f"calibration/a/{name}" for name in ("ece", "brier", "entropy", "ood_entropy")}
    assert figures(first).keys() == names
    assert len(first["rows"]) == len(one["rows"]) > 20
    for found, expected in zip(first["rows"], one["rows"], strict=True):
        value = float(expected.pop("value"))
        assert float(found.pop("value")) == pytest.approx(value, abs=1e-9)
        assert found == expected


@pytest.mark.parametrize("host", HOSTS)
def test_training_is_the_same_bit_for_bit(runs: Any, host: str) -> None:
    with_it, without_it = (runs(2, f"calibration/{host}/{kind}") for kind in ("with", "without"))
    for found, expected in zip(with_it, without_it, strict=True):
        for key, value in expected["params"].items():
            assert torch.equal(found["params"][key], value), key
        assert not set(expected["metrics"]) - set(found["metrics"])
        for key, value in expected["metrics"].items():
            assert found["metrics"][key] == value, key


def test_what_one_process_has_seen_is_refused_in_all(runs: Any) -> None:
    for error in runs(2, "calibration/bad"):
        assert error.kind == "MisconfigurationException"
        assert "labels from 0 to 2 of the multiclass task 'a', got 7" in error.words
