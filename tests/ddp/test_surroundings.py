"""NoiseRobustness and LossLandscape: the figures of all processes' samples, and they only look."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import LossLandscape, NoiseRobustness
from tests.ddp.cases import case, caught
from tests.ddp.net import Batches, Foreign, batches, module, share, without
from tests.ddp.training import HOSTS, train, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


class Logs(Foreign):
    """An ordinary module with a metric, a mean that counts its samples, and none for some batch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(counts=True, **settings)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features = self.encoder(batch[0])
        self.accuracy.update(self.heads["a"](features), batch[1]["a"].clamp(min=0))
        self.log("val/a/accuracy", self.accuracy)
        size = self.heads["b"](features).square().mean()
        self.log("val/b/size", size, batch_size=len(batch[0]), sync_dist=True)


def looks(folder: Path | None = None, **settings: Any) -> list[pl.Callback]:
    def path(name: str) -> Path | None:
        return None if folder is None else folder / f"{name}.csv"

    return [
        NoiseRobustness((0.5, 2.0), 2, csv=path("noise"), **settings),
        LossLandscape(2, 1.0, 3, csv=path("grid"), **settings),
    ]


def data() -> list[Any]:
    """Batches of which processes get different shares, and labels that some of them lack."""
    found = batches(3, rows=[12, 8, 12])
    without(found[0], "b", slice(0, 6))  # none for the first of two processes
    without(found[1], "c", [0, 2, 7])
    without(found[2], "a", slice(0, 12))
    return found


def evaluated(place: Place, host: str) -> dict[str, Any]:
    folder = place.folder / f"looks_{host}_{place.size}"
    model = module(measured=True) if host == "module" else Logs()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = trainer(place, looks(folder))
    (logged,) = made.validate(model, Batches(share(b, place) for b in data()), verbose=False)
    same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    written = {}
    if place.rank == 0:
        for name in ("noise", "grid"):
            with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
                written[name] = list(csv.reader(file))
    return {"logged": logged, "same": same, "written": written}


def failing(place: Place) -> Any:
    """One process cannot evaluate what the others can."""

    class Fails(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            changed = not torch.equal(self.encoder[0].bias, self.start)
            if changed and place.rank == 1:
                raise ValueError("bad sample")

    model = Fails()
    model.start = model.encoder[0].bias.detach().clone()
    mine = Batches(share(b, place) for b in batches(2))
    noise = NoiseRobustness((0.5,), 1)
    error = caught(lambda: trainer(place, [noise]).validate(model, mine, verbose=False))
    return error, torch.equal(model.encoder[0].bias, model.start)


METHOD: list[Any] = [lambda: [CAGrad(), TaskSAM(0.05)]]


def with_looks() -> list[pl.Callback]:
    noise, _ = looks(every_n_epochs=1)
    return [*METHOD[0](), LossLandscape(1, 1.0, 3, data="train", every_n_epochs=1), noise]


for _host in HOSTS:
    case(f"surroundings/{_host}", partial(evaluated, host=_host), (1, 2, 3))
_fit = partial(train, host="module", whole=data(), val=data(), net={"measured": True})
case("surroundings/fit/with", partial(_fit, method=with_looks), (1, 2))
case("surroundings/fit/without", partial(_fit, method=METHOD[0]), (2,))
case("surroundings/failing", failing, (2,))


def ours(logged: dict[str, Any]) -> dict[str, float]:
    found = {k: float(v) for k, v in logged.items() if k.startswith(("noise/", "landscape/"))}
    assert found
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("host", HOSTS)
def test_the_figures_are_those_of_one_process(runs: Any, host: str, size: int) -> None:
    (one,) = runs(1, f"surroundings/{host}")
    several = runs(size, f"surroundings/{host}")
    expected = ours(one["logged"])
    names = {"noise/a/accuracy/radius_2", "noise/c/loss/radius_2_std", "landscape/b/rise"}
    assert names | {f"noise/b/{'mse' if host == 'module' else 'size'}/radius_0"} <= expected.keys()
    for found in several:
        assert ours(found["logged"]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert found["logged"] == several[0]["logged"]
        assert found["same"]
    for name, columns in (("noise", 2), ("grid", 1)):
        expected = by_key(one["written"][name], columns)
        assert len(expected) > 10
        found = by_key(several[0]["written"][name], columns)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            exact = name == "grid" or key[-2] == "loss"  # torchmetrics adds up in single precision
            assert found[key] == pytest.approx(values, abs=1e-10 if exact else 1e-6), key


def by_key(rows: list[list[str]], columns: int) -> dict[tuple[str, ...], list[float]]:
    """The last columns by all others; processes may meet the tasks in another order."""
    return {tuple(row[:-columns]): [float(v) for v in row[-columns:]] for row in rows[1:]}


def test_a_fit_is_the_same_bit_for_bit(runs: Any) -> None:
    with_it, without_it = (runs(2, f"surroundings/fit/{kind}") for kind in ("with", "without"))
    for found, expected in zip(with_it, without_it, strict=True):
        for key, value in expected["params"].items():
            assert torch.equal(found["params"][key], value), key
    (one,) = runs(1, "surroundings/fit/with")
    first, second = (ours(run["metrics"]) for run in with_it)
    assert first == second
    assert first == pytest.approx(ours(one["metrics"]), rel=1e-5, abs=1e-5)


def test_a_process_that_fails_stops_the_others(runs: Any) -> None:
    (first, same), (second, also) = runs(2, "surroundings/failing")
    assert same
    assert also
    assert second.kind == "ValueError"
    assert first.kind == "ProcessError"
    assert "process 1: ValueError: bad sample" in first.words
