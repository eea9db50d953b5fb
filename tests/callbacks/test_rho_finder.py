"""RhoFinder: its curves by hand, what they suggest, and that it only looks."""

import csv
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.func import functional_call

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from lightning_flatmtl.callbacks import RhoFinder, RhoResults, find_rho
from lightning_flatmtl.callbacks._radius_results import RhoRow
from tests import naive
from tests.callbacks.test_sharpness_monitor import Busy, Drawn, noisy
from tests.helpers import assert_identical, data, fit, module, sgd, tasks, trainer
from tests.hosts import HOSTS, smooth_trunk

TASKS = ("a", "b")
CRITERIA = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
FEW: dict[str, Any] = {
    "min_rho": 0.1, "max_rho": 0.4, "min_adaptive_rho": 0.5, "max_adaptive_rho": 2.0,
    "num_radii": 3, "verbose": False,
}  # fmt: skip
METHODS = {"none": list, "F-CAGrad": lambda: [TaskSAM(rho=0.1), CAGrad()], "FAMO": lambda: [FAMO()]}


def finder(**settings: Any) -> RhoFinder:
    return RhoFinder(**{**FEW, **settings})


def part_of(params: naive.Params, prefix: str) -> naive.Params:
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def loss_at(net: Any, batch: Any, task: str, params: naive.Params) -> Any:
    features = functional_call(net.encoder, part_of(params, "encoder."), (batch[0],))
    out = functional_call(net.heads[task], part_of(params, f"heads.{task}."), (features,))
    return CRITERIA[task](out, batch[1][task])


def by_hand(net: Any, batch: Any) -> dict[tuple[str, str, bool, float], list[float]]:
    """Loss, rise, cosine and length of the gradient on one batch, by deep copies."""
    at = {name: p.detach().clone() for name, p in net.named_parameters()}
    shared = [name for name in at if name.startswith("encoder.")]
    found = {}
    for task in TASKS:
        head = f"heads.{task}."

        loss_of = partial(loss_at, net, batch, task)
        parts = {"shared": shared, "head": [name for name in at if name.startswith(head)]}
        for part, names in parts.items():
            clean = naive.gradient(loss_of, at, names)
            g = naive.vector(clean)
            for adaptive, radii in ((False, (0.1, 0.2, 0.4)), (True, (0.5, 1.0, 2.0))):
                for rho in radii:
                    there = naive.perturb(at, clean, rho, adaptive)
                    s = naive.vector(naive.gradient(loss_of, there, names))
                    loss = float(loss_of(there))
                    found[task, part, adaptive, rho] = [
                        loss,
                        loss - float(loss_of(at)),
                        float(s @ g / s.norm() / g.norm()),
                        float(s.norm() / g.norm()),
                    ]
    return found


class ByHand(pl.Callback):
    """The same before a step, the mean over batches weighted by their samples."""

    def __init__(self, step: int, batches: list[Any] | None) -> None:
        self.step, self.batches = step, batches
        self.expected: dict[Any, list[float]] = {}

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        if trainer.global_step == self.step:
            batches = [batch] if self.batches is None else self.batches
            n = sum(len(x) for x, _ in batches)
            for of_batch in batches:
                for key, values in by_hand(net, of_batch).items():
                    means = [len(of_batch[0]) / n * value for value in values]
                    before = self.expected.get(key, [0.0] * 4)
                    self.expected[key] = [a + b for a, b in zip(before, means, strict=True)]


def figures(rows: Any) -> dict[tuple[str, str, bool, float], list[float]]:
    return {
        (r.task, r.part, r.adaptive, round(r.rho, 12)): [r.loss, r.rise, r.cosine, r.gradient]
        for r in rows
    }


VALIDATED = {"module": MultiTaskModule, "taken over": Busy}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_the_curves_are_those_of_a_computation_by_hand(host, method) -> None:
    val = data(n=29, seed=4)  # batches of 8, 8, 8 and 5, of which the first and the last two count
    val = torch.utils.data.DataLoader(val.dataset, batch_size=12)
    looks, hand = finder(warmup_steps=2, batches=3), ByHand(2, list(val))
    net = HOSTS[host](trunk=smooth_trunk(), kind=VALIDATED[host])
    fit(net, [looks, hand, *METHODS[method]()], val=val)
    results = looks.results
    assert results is not None
    assert results.data == "validation"
    found = figures(results.rows)
    assert found.keys() == hand.expected.keys()
    for key, expected in hand.expected.items():
        assert found[key] == pytest.approx(expected, rel=1e-10, abs=1e-12), key


@pytest.mark.parametrize("host", HOSTS)
def test_without_validation_data_it_is_the_batch_at_hand(host) -> None:
    looks, hand = finder(warmup_steps=1), ByHand(1, None)
    fit(HOSTS[host](trunk=smooth_trunk()), [looks, hand, TaskSAM(rho=0.05)])
    assert looks.results is not None
    assert looks.results.data == "training"
    found = figures(looks.results.rows)
    for key, expected in hand.expected.items():
        assert found[key] == pytest.approx(expected, rel=1e-10, abs=1e-12), key


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_training_is_the_same_bit_for_bit(host, method, validated) -> None:
    nets, logs, drawn, steps = [], [], [], []
    for looks in ([finder(warmup_steps=7)], []):
        torch.manual_seed(6)
        net, draws = noisy(host), Drawn()
        torch.manual_seed(7)
        loaders = {"loader": data(n=40), "val": data(n=21, seed=2) if validated else None}
        loaders["loader"] = torch.utils.data.DataLoader(
            loaders["loader"].dataset, batch_size=8, shuffle=True, drop_last=True
        )
        made = fit(net, [*looks, draws, *METHODS[method]()], max_epochs=3, **loaders)
        assert all(look.results is not None for look in looks)
        nets.append(net)
        logs.append({k: v.item() for k, v in made.callback_metrics.items()})
        drawn.append(draws.found)
        steps.append(made.global_step)
    assert_identical(*nets)
    assert nets[0].encoder[1].num_batches_tracked == 15
    assert logs[0] == logs[1]
    assert drawn[0] == drawn[1]
    assert steps[0] == steps[1]


def test_it_writes_to_no_logger(tmp_path) -> None:
    tables = []
    for name, looks in (("with", [finder(warmup_steps=1)]), ("without", [])):
        logger = CSVLogger(tmp_path, name)
        fit(module(), [*looks, CAGrad()], val=data(seed=1), logger=logger, log_every_n_steps=1)
        tables.append((Path(logger.log_dir) / "metrics.csv").read_text("utf-8"))
    assert tables[0] == tables[1]


# What the curves suggest.


def made_up(slope: float, adaptive: bool = False) -> RhoResults:
    """Losses that were 2, are 1 and rise by ``slope`` per radius and part."""
    rows = [
        RhoRow(100, task, part, adaptive, rho, 1 + slope * rho, slope * rho, 0.9, 1.0)
        for task in TASKS
        for part in ("shared", "head")
        for rho in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
    ]
    return RhoResults(tuple(rows), {"a": 2.0, "b": 2.0}, "validation")


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_radius_is_suggested_where_the_losses_rise_by_the_share(adaptive) -> None:
    # Of shared parameters and heads together 2 * slope * rho / 2, which is 0.15 at rho = 0.08.
    found = made_up(1.875, adaptive)
    assert found.rise(adaptive)[0.04] == pytest.approx(0.075)
    assert found.suggestion(adaptive) == 0.08
    # Between two radii log-linear: 0.15 is halfway from 0.1 (at 0.04) to 0.2 (at 0.08).
    assert made_up(2.5).suggestion() == float(f"{0.04 * 2**0.5:.2g}")


def test_the_largest_is_suggested_where_none_is_too_large_and_none_where_all_are() -> None:
    assert made_up(0.1).suggestion() == 0.32
    assert made_up(100.0).suggestion() is None
    assert "none of these radii is small enough" in made_up(100.0).markdown()
    words = "suggested: TaskSAM(rho=0.32). None of these radii is too large."
    assert words in made_up(0.1).markdown()


def test_losses_below_zero_have_a_share_too() -> None:
    found = made_up(1.875)
    for begin in ({"a": -2.0, "b": 2.0}, {"a": -2.0, "b": -2.0}):
        assert replace(found, begin=begin).suggestion() == found.suggestion()
    assert replace(found, begin={"a": 0.0, "b": 2.0}).suggestion() is None


def test_a_radius_kills_that_undoes_what_was_learned() -> None:
    assert made_up(12.5).killed() == pytest.approx(0.08)  # by one part alone: 1 of the 2 before
    assert made_up(0.1).killed() is None
    assert "About 0.08 undoes what was learned." in made_up(12.5).markdown()


def test_where_nothing_was_learned_nothing_is_undone() -> None:
    rows = tuple(replace(row, loss=row.loss + 1) for row in made_up(1.0).rows)
    assert RhoResults(rows, {"a": 2.0, "b": 2.0}, "training").killed() is None


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_too_large(lost) -> None:
    rows = [
        RhoRow(1, "a", "shared", False, rho, loss, loss - 1.0, 0.5, 1.0)
        for rho, loss in ((0.1, 1.1), (0.2, lost), (0.4, lost))
    ]
    found = RhoResults((*rows,), {"a": 2.0}, "validation")
    assert found.suggestion() == 0.1
    assert found.killed() == 0.1


# What becomes of it.


class Radius(pl.Callback):
    """Sets the radius by hand before a step."""

    def __init__(self, step: int, rho: float) -> None:
        self.step, self.rho = step, rho

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        if trainer.global_step == self.step:
            from lightning_flatmtl.takeover import host_of

            (sam,) = (c for c in trainer.callbacks if isinstance(c, TaskSAM))
            sam.sharpness = TaskSAM(rho=self.rho).sharpness
            host = host_of(net)
            (host.fit if hasattr(host, "fit") else host._fit).sharpness = sam.sharpness


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("host", HOSTS)
def test_the_rest_of_the_fit_uses_the_radius(host, rho) -> None:
    nets = []
    looks = finder(warmup_steps=2, update_attr=True, min_rho=1e-3, min_adaptive_rho=1e-2)
    for make in (lambda: looks, lambda: Radius(2, looks.results.suggestion())):
        net, sam = HOSTS[host](trunk=smooth_trunk()), TaskSAM(rho=rho)
        fit(net, [make(), sam, CAGrad()], max_epochs=2)
        nets.append(net)
        assert sam.sharpness.rho_shared == looks.results.suggestion() != rho
        assert sam.sharpness.rho_heads == sam.sharpness.rho_shared
    assert_identical(*nets)


def test_what_is_not_to_move_does_not() -> None:
    sam = TaskSAM(rho=0.05, rho_heads=0.0, adaptive=True)
    looks = finder(warmup_steps=1, update_attr=True, min_rho=1e-3, min_adaptive_rho=1e-2)
    fit(module(trunk=smooth_trunk()), [looks, sam])
    assert sam.sharpness.rho_shared == looks.results.suggestion(adaptive=True)
    assert sam.sharpness.rho_heads == 0.0


@pytest.mark.parametrize("warmup", [2, 5])
@pytest.mark.parametrize("host", HOSTS)
def test_a_resumed_fit_goes_on_where_it_was(host, warmup, tmp_path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [
            finder(warmup_steps=warmup, update_attr=True, min_rho=1e-3, min_adaptive_rho=1e-2),
            TaskSAM(rho=0.0),
            CAGrad(),
        ]

    def made() -> Any:
        return HOSTS[host](kind=VALIDATED[host])

    whole, parts, looks = made(), made(), callbacks()
    fit(whole, looks, max_epochs=3, val=data(seed=5))
    with pytest.warns(UserWarning, match="nothing was found") if warmup > 3 else nullcontext():
        half = fit(made(), callbacks(), max_epochs=1, val=data(seed=5))
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = callbacks()
    fit(parts, again, max_epochs=3, val=data(seed=5), ckpt_path=tmp_path / "half.ckpt")
    assert_identical(whole, parts)
    assert looks[0].results == again[0].results is not None


def test_it_writes_prints_and_draws(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    files = {"csv": tmp_path / "new" / "rho.csv", "png": str(tmp_path / "new" / "rho.png")}
    looks = finder(warmup_steps=2, verbose=True, **files)
    fit(module(), [looks], val=data(seed=1))
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(looks.results.rows)
    assert list(rows[0]) == list(looks.results.table()[0])
    assert [float(r["loss"]) for r in rows] == [r.loss for r in looks.results.rows]
    assert Path(files["png"]).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "On validation batches, after 2 steps:" in printed
    assert "suggested: TaskSAM(rho=" in printed
    panels = looks.results.plot().axes
    titles = {panel.get_title() for panel in panels}
    assert titles == {
        f"{part}, {kind}"
        for part in ("shared parameters", "heads")
        for kind in ("plain", "adaptive")
    }
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    curve = [
        r
        for r in looks.results.rows
        if (r.step, r.task, r.part, r.adaptive) == (2, "a", "shared", False)
    ]
    assert list(lines["a"].get_xdata()) == [r.rho for r in curve]
    assert list(lines["a"].get_ydata()) == [r.loss for r in curve]


def test_a_fit_that_is_too_short_says_so() -> None:
    looks = finder(warmup_steps=99)
    with pytest.warns(UserWarning, match="after 99 optimizer steps, got a fit that ended after 3"):
        fit(module(), [looks])
    assert looks.results is None


def test_by_default_it_waits_for_a_third_of_the_fit() -> None:
    looks = finder()
    fit(module(), [looks], max_epochs=3)
    assert {row.step for row in looks.results.rows} == {3}


@pytest.mark.parametrize("host", HOSTS)
def test_find_rho_leaves_nothing_behind(host, tmp_path) -> None:
    nets, logged, drawn = [], [], []
    for find in (True, False):
        torch.manual_seed(6)
        net, draws = noisy(host), Drawn()
        generator = torch.Generator().manual_seed(5)
        loader = torch.utils.data.DataLoader(
            data(n=40).dataset, batch_size=8, shuffle=True, generator=generator
        )
        made = trainer([draws, CAGrad(), TaskSAM(rho=0.1)], max_epochs=2, default_root_dir=tmp_path)
        torch.manual_seed(7)
        if find:
            before = dict(vars(made))
            results = find_rho(made, net, loader, data(seed=2), warmup_steps=4, **FEW)
            assert results.rows[0].step == 4
            assert made.global_step == 0
            assert made.callback_metrics == {}
            assert {k: v for k, v in vars(made).items() if before[k] is not v} == {}
            assert made.strategy._lightning_module is None
        made.fit(net, loader, data(seed=2))
        nets.append(net)
        logged.append({k: v.item() for k, v in made.callback_metrics.items()})
        drawn.append(draws.found)
    assert_identical(*nets)
    assert logged[0] == logged[1]
    assert drawn[0] == drawn[1]
    assert list(tmp_path.iterdir()) == []


def test_find_rho_finds_what_the_callback_finds_in_a_fit_without_flatness() -> None:
    looks = finder(warmup_steps=2)
    fit(module(), [looks, CAGrad()], val=data(seed=2))
    made = trainer([CAGrad(), TaskSAM(rho=7.0)])
    found = find_rho(made, module(), data(), data(seed=2), warmup_steps=2, **FEW)
    assert found == looks.results


def test_find_rho_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="`update_attr` of find_rho must be False, got True"):
        find_rho(trainer(), module(), data(), update_attr=True)
    with (
        pytest.warns(UserWarning, match="nothing was found"),
        pytest.raises(MisconfigurationException, match="longer than the warm-up"),
    ):
        find_rho(trainer(), module(), data(), warmup_steps=99, **FEW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_rho": 0.0}, r"`min_rho` must be in \(0, inf\), got 0.0"),
        ({"min_rho": math.nan}, r"`min_rho` must be in \(0, inf\), got nan"),
        ({"max_rho": 0.001}, r"`max_rho` must be in \(0.00390625, inf\), got 0.001"),
        ({"max_rho": math.inf}, r"`max_rho` must be in \(0.00390625, inf\), got inf"),
        ({"min_adaptive_rho": "1"}, r"`min_adaptive_rho` must be in \(0, inf\), got '1'"),
        ({"max_adaptive_rho": 0.01}, r"`max_adaptive_rho` must be in \(0.0625, inf\), got 0.01"),
        ({"num_radii": 1}, "`num_radii` must be an integer >= 2, got 1"),
        ({"num_radii": 2.5}, "`num_radii` must be an integer >= 2, got 2.5"),
        ({"warmup_steps": -1}, "`warmup_steps` must be an integer >= 0 or None, got -1"),
        ({"warmup_steps": 0.1}, "`warmup_steps` must be an integer >= 0 or None, got 0.1"),
        ({"batches": 0}, "`batches` must be an integer >= 1, got 0"),
        ({"update_attr": 1}, "`update_attr` must be True or False, got 1"),
        ({"verbose": None}, "`verbose` must be True or False, got None"),
        ({"csv": "rho.txt"}, "`csv` must be the path of a .csv file, got 'rho.txt'"),
        ({"png": 3}, "`png` must be the path of a .png file, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        RhoFinder(**settings)


def test_what_it_cannot_do_is_refused_before_the_first_batch() -> None:
    with pytest.raises(MisconfigurationException, match="sets the radius of a TaskSAM"):
        fit(module(), [RhoFinder(update_attr=True), CAGrad()])

    flat = [RhoFinder(update_attr=True), TaskSAM(rho=0.0), CAGrad()]
    with pytest.raises(MisconfigurationException, match="gradients='parameters'"):
        fit(module(gradients="features"), flat)
    nested = [RhoFinder(update_attr=True), TaskSAM(rho=0.0, aggregate="each"), FAMO()]
    with pytest.raises(ValueError, match="aggregates directions, which belong to no task"):
        fit(module(), nested)

    net = HOSTS["taken over"]()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        fit(net, [RhoFinder()])


def test_it_is_found_by_its_class_name() -> None:
    import lightning_flatmtl.cli  # noqa: F401

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    given = parser.parse_args(["--callbacks+=RhoFinder", "--callbacks.warmup_steps=7"])
    (made,) = instantiate(given).callbacks
    assert isinstance(made, RhoFinder)
    assert made.warmup_steps == 7


def test_a_radius_that_is_not_found_leaves_the_old_one() -> None:
    sam, looks = TaskSAM(rho=0.05), finder(warmup_steps=1, update_attr=True, min_rho=50, max_rho=90)
    with pytest.warns(UserWarning, match="found all its radii too large"):
        fit(module(trunk=smooth_trunk()), [looks, sam])
    assert sam.sharpness.rho_shared == 0.05


def test_of_a_single_task_all_is_its_head(capsys) -> None:
    net = MultiTaskModule(smooth_trunk(), tasks()[:1], optimizer=sgd).double()
    looks = finder(warmup_steps=1, verbose=True)
    fit(net, [looks])
    assert {(row.task, row.part) for row in looks.results.rows} == {("a", "head")}
    assert looks.results.suggestion() is not None
    assert "On training batches, after 1 steps:" in capsys.readouterr().out
