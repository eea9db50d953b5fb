"""LossLandscape: its grid against a brute force, and what it writes and refuses."""

import csv
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import LossLandscape
from tests.callbacks.surroundings import MEASURED, at, by_filter, gaussian
from tests.helpers import data, fit, module, trainer
from tests.hosts import HOSTS, foreign

METHODS = {"none": list, "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.1)]}


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def brute_force(net: nn.Module, loader: Any, dims: int, biases: bool, point: Any) -> Any:
    directions = [by_filter(net, drawn, biases) for drawn in gaussian(net, 3, dims)]
    steps = [torch.zeros_like(p) for p in net.parameters()]
    for coefficient, direction in zip(point, directions, strict=True):
        steps = [s + coefficient * d for s, d in zip(steps, direction, strict=True)]
    found = at(net, loader.dataset, steps)
    return {"a": found["a/loss"], "b": found["b/loss"]}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_the_grid_is_that_of_a_brute_force(host, method, dims, biases, tmp_path) -> None:
    file, val, train = tmp_path / "new" / "grid.csv", data(n=20, seed=1), data(n=20)
    stage = "val" if host == "module" else "train"  # the other host has no validation step
    looks = LossLandscape(dims, 0.8, 5, batches=None, data=stage, biases=biases, seed=3, csv=file)
    net = HOSTS[host]()
    val = val if host == "module" else None
    made = fit(net, [*METHODS[method](), looks], train, val, max_epochs=2)
    written = rows(file)
    assert len(written) == 2 * 5**dims
    losses: dict[tuple[str, tuple[float, ...]], float] = {}
    for row in written:
        point = tuple(float(row[axis]) for axis in "xy"[:dims])
        losses[row["task"], point] = float(row["loss"])
        expected = brute_force(net, val or train, dims, biases, point)
        assert float(row["loss"]) == pytest.approx(expected[row["task"]], abs=1e-9)
    assert {x for _, (x, *_) in losses} == {-0.8, -0.4, 0.0, 0.4, 0.8}
    for task in ("a", "b"):
        centre = losses[task, (0.0,) * dims]
        ends = [(0.8,), (-0.8,)] if dims == 1 else [(0.8, 0), (-0.8, 0), (0, 0.8), (0, -0.8)]
        rise = sum(losses[task, end] for end in ends) / len(ends) - centre
        highest = max(loss for (t, _), loss in losses.items() if t == task)
        logged = {n: made.callback_metrics[f"landscape/{task}/{n}"].item() for n in NAMES}
        assert logged == pytest.approx(
            {"loss": centre, "rise": rise, "max_rise": highest - centre}, abs=1e-6
        )
    assert max(losses.values()) - min(losses.values()) > 0.01


NAMES = ("loss", "rise", "max_rise")


@pytest.mark.parametrize("run", ["validate", "test"])
@pytest.mark.parametrize("host", MEASURED)
def test_it_looks_in_an_evaluation(host, run, tmp_path) -> None:
    file, loader = tmp_path / "grid.csv", data(n=20, seed=1)
    net = MEASURED[host]()
    looks = LossLandscape(1, 1.0, 3, seed=3, csv=file)
    (returned,) = getattr(trainer([looks]), run)(net, loader, verbose=False)
    for row in rows(file):
        assert row["run"] == run
        expected = brute_force(net, loader, 1, False, [float(row["x"])])
        assert float(row["loss"]) == pytest.approx(expected[row["task"]], abs=1e-9)
    assert returned["landscape/a/loss"] == pytest.approx(float(rows(file)[1]["loss"]), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled.*")
def test_batches_are_the_same_at_every_point_and_limited(tmp_path) -> None:
    seen: list[Tensor] = []

    class Sees(type(module())):
        def encode(self, batch: Any) -> Any:
            if not self.training:
                seen.append(batch[0].clone())
            return super().encode(batch)

    loader = data(n=40, seed=1)
    shuffled = torch.utils.data.DataLoader(loader.dataset, batch_size=8, shuffle=True)
    net = module(kind=Sees)
    fit(net, [LossLandscape(1, 1.0, 3, batches=2)], val=shuffled, num_sanity_val_steps=0)
    looked_at = seen[5:]
    assert len(looked_at) == 6
    assert all(torch.equal(x, looked_at[0]) for x in looked_at[:3])
    assert all(torch.equal(x, looked_at[3]) for x in looked_at[3:])
    assert not torch.equal(looked_at[0], looked_at[3])


def test_a_part_with_random_numbers_draws_the_same_at_every_point(tmp_path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(1, dtype=x.dtype)  # in evaluation mode too

    file = tmp_path / "grid.csv"
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), Noisy())
    net = module(trunk=trunk)
    with torch.no_grad():  # no direction has a length
        for p in net.parameters():
            p.zero_()
        net.heads["b"].bias.fill_(1.0)
        net.encoder[1].bias.fill_(1.0)
    trainer([LossLandscape(2, 1.0, 3, csv=file)]).validate(net, data(n=24), verbose=False)
    assert len({row["loss"] for row in rows(file) if row["task"] == "b"}) == 1


def test_losses_that_are_lost_are_told(tmp_path) -> None:
    class Explodes(type(module())):
        def losses(self, batch: Any, batch_idx: int) -> Any:
            found = super().losses(batch, batch_idx)
            moved = not torch.equal(self.encoder[0].weight, self.start)
            return {**found, "b": found["b"] * math.inf} if moved else found

    pytest.importorskip("matplotlib")
    net, file = module(kind=Explodes), tmp_path / "grid.csv"
    net.start = net.encoder[0].weight.detach().clone()
    looks = LossLandscape(2, 1.0, 3, csv=file, png=tmp_path / "grid.png")
    (logged,) = trainer([looks]).validate(net, data(n=8), verbose=False)
    assert [row["loss"] for row in rows(file) if row["task"] == "b"].count("inf") == 8
    assert logged["landscape/b/rise"] == math.inf
    assert math.isfinite(logged["landscape/a/rise"])
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2, 7, 15])
def test_it_draws_a_picture(dims, tasks, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from lightning_flatmtl.callbacks._landscape_picture import draw_curves, draw_surfaces

    axis = [-1.0, 0.0, 1.0]
    losses = {f"t{i}": [math.exp(i + j) for j in range(3**dims)] for i in range(tasks)}
    losses["t0"] = [1.0] * 3**dims
    draw = draw_curves if dims == 1 else draw_surfaces
    draw(losses, axis, "test data", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_a_fit_without_validation_data_is_refused_before_the_first_batch() -> None:
    message = r"LossLandscape looks at validation data, got a fit without any"
    for net in (module(), foreign()):
        with pytest.raises(MisconfigurationException, match=message):
            fit(net, [LossLandscape()])


def test_a_module_that_returns_no_losses_is_told_at_the_first_batch() -> None:
    class Silent(type(foreign())):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch_idx == 0
            return super().training_step(batch, batch_idx)["loss"]

    message = "For LossLandscape `training_step` must return"
    with pytest.raises(MisconfigurationException, match=message):
        fit(foreign(kind=Silent), [LossLandscape(data="train")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 3}, "`dimensions` must be 1 or 2, got 3"),
        ({"dimensions": True}, "`dimensions` must be 1 or 2, got True"),
        ({"radius": 0.0}, r"`radius` must be in \(0, inf\), got 0.0"),
        ({"radius": math.nan}, r"`radius` must be in \(0, inf\), got nan"),
        ({"radius": "1"}, r"`radius` must be in \(0, inf\), got '1'"),
        ({"points": 4}, "`points` must be an odd integer >= 3 or None, got 4"),
        ({"points": 1}, "`points` must be an odd integer >= 3 or None, got 1"),
        ({"points": 5.0}, "`points` must be an odd integer >= 3 or None, got 5.0"),
        ({"data": "test"}, "`data` must be 'val' or 'train', got 'test'"),
        ({"biases": None}, "`biases` must be True or False, got None"),
        ({"batches": math.nan}, "`batches` must be an integer >= 1 or None, got nan"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer >= 1 or None, got 0"),
        ({"seed": 0.5}, "`seed` must be an integer >= 0, got 0.5"),
        ({"runs": ["predict"]}, r"`runs` must be one or more of .*, got \['predict'\]"),
        ({"csv": "grid.png"}, "`csv` must be the path of a .csv file, got 'grid.png'"),
        ({"png": "grid.csv"}, "`png` must be the path of a .png file, got 'grid.csv'"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LossLandscape(**settings)


def test_it_is_pickled_and_found_by_its_class_name() -> None:
    from jsonargparse import ArgumentParser

    import lightning_flatmtl.cli  # noqa: F401

    assert pickle.loads(pickle.dumps(LossLandscape(1))).points == 41
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    given = {"class_path": "LossLandscape", "init_args": {"dimensions": 1, "data": "train"}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, LossLandscape)
    assert made.dimensions == 1
