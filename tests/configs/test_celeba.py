"""Two steps of the rows of CelebA's comparison, on small images of the true format."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_flatmtl.comparison.plan import Run
from lightning_flatmtl.data import CelebA
from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers.celeba import write_celeba

FOLDER = EXAMPLES / "celeba"
METHODS = ("LS", "UW", "MGDA", "PCGrad", "CAGrad", "IMTL")
FEW = 2  # attributes: the command line takes long to read forty tasks for every row


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All rows, with small images and few attributes; the heads stay what they are."""
    folder = tmp_path_factory.mktemp("celeba")
    write_celeba(folder)
    base = read("base.yaml")
    base["trainer"]["accelerator"] = "cpu"
    model, data = base["model"]["init_args"], base["data"]["init_args"]
    model["encoder"]["init_args"] |= {"width": 1, "features": 2048}
    model["tasks"] = model["tasks"][:FEW]
    data |= {"root": str(folder), "cache": str(folder / "cache"), "size": 16}
    data |= {"batch_size": 2, "num_workers": 0}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "compare.yaml").write_text((FOLDER / "compare.yaml").read_text())
    return rows(folder / "compare.yaml")


def test_every_attribute_is_a_task_of_the_published_kind() -> None:
    tasks = read("base.yaml")["model"]["init_args"]["tasks"]
    kind = {"in_features": 2048, "num_classes": 2, "metric": "error_rate"}
    expected = [{"name": name, **kind} for name in CelebA.ATTRIBUTES]
    assert [task["init_args"] for task in tasks] == expected
    assert {task["class_path"] for task in tasks} == {"ClassificationTask"}


def test_the_comparison_has_every_row_of_the_table(found: dict[str, Run]) -> None:
    single = {f"single-task {name}" for name in CelebA.ATTRIBUTES[:FEW]}
    assert set(found) == single | {*METHODS, *(f"F-{method}" for method in METHODS)}


@pytest.mark.parametrize("name", ["UW", "F-CAGrad", f"single-task {CelebA.ATTRIBUTES[0]}"])
def test_two_steps(found: dict[str, Run], tmp_path: Path, name: str) -> None:
    two_steps([found[name]], tmp_path)
