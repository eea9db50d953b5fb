"""The clothing reviews: every row of their comparisons, two steps of some."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from lightning_flatmtl.comparison.plan import Run
from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers.clothing_reviews import write_clothing_reviews

FOLDER = EXAMPLES / "clothing_reviews"
METHODS = {"LS", "F-LS", "CAGrad", "F-CAGrad"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_clothing_reviews(tmp_path_factory.mktemp("data"), count=160)


@pytest.fixture(scope="module")
def found(root) -> Callable[[str], Mapping[str, Run]]:
    """The rows of a comparison, on small data."""
    small = (f"--data.init_args.root={root}", "--data.init_args.batch_size=8")
    return cache(lambda name: rows(FOLDER / f"{name}.yaml", *small))


def test_the_tables_have_every_row(found) -> None:
    singles = {f"single-task {task}" for task in ("rating", "recommended", "department")}
    assert set(found("compare")) == METHODS | singles
    assert set(found("compare_long")) == {"LS (long)"}
    singles = {f"single-task {task}" for task in ("punctuation", "recommended", "department")}
    assert set(found("compare_tagging")) == (METHODS - {"F-LS"}) | singles


def test_model_and_data_have_the_same_sizes(found) -> None:
    for name in ("compare", "compare_long", "compare_tagging"):
        for run in found(name).values():
            encoder = run.config["model"]["init_args"]["encoder"]["init_args"]
            data = run.config["data"]["init_args"]
            assert encoder["vocabulary"] == data["vocabulary"]
            assert encoder.get("longest") in (None, data["longest"])  # a recurrence has no bound
            schedule = run.config["model"]["init_args"]["lr_scheduler"]["init_args"]
            assert schedule["T_max"] == run.config["trainer"]["max_epochs"]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("compare", ("F-CAGrad", "single-task department")),
        ("compare_tagging", ("F-CAGrad", "single-task punctuation")),
    ],
)
def test_two_steps(found, tmp_path, name, chosen) -> None:
    two_steps([found(name)[row] for row in chosen], tmp_path)
