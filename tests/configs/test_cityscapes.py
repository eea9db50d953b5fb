"""Cityscapes: every row of its comparison, two steps of some."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from lightning_flatmtl.comparison.plan import Run
from tests.configs.test_nyuv2 import METHODS, SMALL, narrowed
from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers import cityscapes

FOLDER = EXAMPLES / "cityscapes"
RADII = {
    "F-LS": (0.001, False),
    "F-MGDA": (0.0025, False),
    "F-MGDA (direct)": (0.0025, False),
    "F-CAGrad": (0.001, True),
    "F-IMTL": (0.0003, True),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cityscapes"
    return cityscapes.write(folder, train=4, val=2, size=(32, 32))


@pytest.fixture(scope="module")
def found(root: Path) -> Callable[[str], Mapping[str, Run]]:
    """The rows of a comparison, on small data."""
    return cache(
        lambda name: rows(FOLDER / f"{name}.yaml", f"--data.init_args.root={root}", *SMALL)
    )


def test_the_table_has_every_row(found) -> None:
    expected = {name for method in METHODS for name in (method, f"F-{method}")}
    singles = {"single-task segmentation", "single-task depth"}
    assert set(found("compare")) == expected | singles | {"F-MGDA (direct)"}
    assert set(found("single_task")) == singles | {"LS"}


def test_the_radii_are_the_published_ones(found) -> None:
    for name, radius in RADII.items():
        *_, sam = found("compare")[name].config["trainer"]["callbacks"]
        assert (sam["init_args"]["rho"], sam["init_args"]["adaptive"]) == radius


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("compare", ("IMTL", "F-MGDA (direct)", "single-task depth")),
        ("single_task", ("LS",)),
    ],
)
def test_two_steps(found, tmp_path, name, chosen) -> None:
    runs = found(name)
    two_steps(narrowed([runs[row] for row in chosen]), tmp_path)
