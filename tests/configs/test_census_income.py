"""Census-Income: every row of its comparisons, two steps of some."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_flatmtl.cli import FlatMTLCLI
from lightning_flatmtl.comparison.plan import Run
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.data import CensusIncome
from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers.census_income import write_census_income

FOLDER = EXAMPLES / "census_income"
SHARING = ("trunk", "cross-stitch", "MMoE", "CGC", "PLE", "attention")
METHODS = ("LS", "MGDA", "PCGrad", "CAGrad", "IMTL", "NashMTL")
SMALL = (
    "--model.init_args.encoder.init_args.widths=[4]",
    "--model.init_args.encoder.init_args.embedding=1",
    "--data.init_args.batch_size=12",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_census_income(tmp_path_factory.mktemp("data"), train=80, test=40)


@pytest.fixture(scope="module")
def found(root) -> Callable[[str], Mapping[str, Run]]:
    """The rows of a comparison, on small data."""
    return cache(
        lambda name: rows(FOLDER / f"{name}.yaml", f"--data.init_args.root={root}", *SMALL)
    )


def narrowed(runs: Sequence[Run]) -> Sequence[Run]:
    """Heads of tasks stand in a list, which arguments cannot reach into."""
    for run in runs:
        for task in run.config["model"]["init_args"]["tasks"]:
            task["init_args"]["in_features"] = 4
    return runs


def radii(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    trainers = [run.config["trainer"] for run in runs.values()]
    callbacks = [c for trainer in trainers for c in trainer.get("callbacks") or ()]
    return [c["init_args"] for c in callbacks if c["class_path"].endswith("TaskSAM")]


def test_the_table_has_every_row(found) -> None:
    expected = {name for method in METHODS for name in (method, f"F-{method}")}
    singles = {"single-task income", "single-task never_married"}
    assert set(found("compare")) == expected | singles
    assert set(found("compare_long")) == {"LS (long)", "CAGrad (long)"}


def test_the_radius_is_one_of_those_tried(found) -> None:
    chosen, tried = radii(found("compare")), radii(found("tune"))
    assert len(chosen) == 6
    assert all(radius == chosen[0] for radius in chosen)
    assert chosen[0] in tried


def test_the_tables_of_the_encoder_are_those_of_the_data(found) -> None:
    for run in found("compare").values():
        encoder = run.config["model"]["init_args"]["encoder"]["init_args"]
        assert tuple(encoder["categories"]) == CensusIncome.CARDINALITIES
        assert encoder["numeric"] == len(CensusIncome.NUMERIC)


def test_the_schedule_ends_with_the_training(found) -> None:
    for name in ("compare", "compare_long"):
        for run in found(name).values():
            schedule = run.config["model"]["init_args"]["lr_scheduler"]["init_args"]
            assert schedule["T_max"] == run.config["trainer"]["max_epochs"]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("compare", ("LS", "F-LS", "CAGrad", "F-CAGrad", "single-task income")),
        ("compare_long", ("LS (long)",)),
        ("tune", ("F-LS (0.05)",)),
    ],
)
def test_two_steps(found, tmp_path, name, chosen) -> None:
    runs = found(name)
    two_steps(narrowed([runs[row] for row in chosen]), tmp_path)


# Ways to share: the encoders are those of the file, which are small enough.
STEPPED = ("F-LS soft (trace)", "F-CAGrad PLE", "CAGrad attention")


@pytest.fixture(scope="module")
def sharing(root) -> Mapping[str, Run]:
    arguments = (f"--data.init_args.root={root}", "--data.init_args.batch_size=12")
    only = [*(f"LS {way}" for way in (*SHARING, "soft", "soft (trace)")), *STEPPED]
    return rows(FOLDER / "compare_sharing.yaml", *arguments, only=only)


def test_every_way_to_share_has_every_method() -> None:
    settings = Settings.load(FOLDER / "compare_sharing.yaml", [])
    expected = {f"{m} {way}" for way in SHARING for m in ("LS", "F-LS", "CAGrad", "F-CAGrad")}
    expected |= {f"{m} {way}" for way in ("soft", "soft (trace)") for m in ("LS", "F-LS")}
    assert set(settings.methods) == expected
    assert settings.single_task is not None
    for name, callbacks in settings.methods.items():
        flat = {"class_path": "TaskSAM", "init_args": {"rho": 0.01}}
        method = name.split()[0]
        aggregator = [{"class_path": "CAGrad"}] if "CAGrad" in method else []
        assert callbacks == aggregator + ([flat] if method.startswith("F-") else [])


def test_the_networks_are_of_one_size(sharing, tmp_path) -> None:
    for way in (*SHARING, "soft", "soft (trace)"):
        config = sharing[f"LS {way}"].config
        path = tmp_path / "run.yaml"
        of_command = {"ckpt_path", "weights_only"}
        path.write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in of_command}))
        model = FlatMTLCLI([f"--config={path}"], run=False).model
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(27_906, rel=0.03), way
        (table,) = {m.categories for m in model.modules() if getattr(m, "categories", ())}
        assert table == CensusIncome.CARDINALITIES


def test_two_steps_of_ways_to_share(sharing, tmp_path) -> None:
    two_steps([sharing[row] for row in STEPPED], tmp_path)
