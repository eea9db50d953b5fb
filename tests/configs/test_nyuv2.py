"""NYUv2: every row of its comparison, two steps of some, and the other networks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import yaml

from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison.plan import Run
from tests.configs.two_steps import EXAMPLES, QUIET, rows, two_steps
from tests.data.writers import nyuv2

FOLDER = EXAMPLES / "nyuv2"
TASKS = ["segmentation", "depth", "normals"]
METHODS = (
    "LS",
    "SI",
    "RLW",
    "DWA",
    "UW",
    "GradDrop",
    "NashMTL",
    "MGDA",
    "PCGrad",
    "CAGrad",
    "IMTL",
)
SMALL = (
    "--data.init_args.batch_size=2",
    "--data.init_args.num_workers=0",
    "--data.init_args.val_fraction=0.5",  # two steps have validation, whatever the limit
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nyuv2.write(tmp_path_factory.mktemp("data") / "nyuv2", train=4, val=2, size=(32, 32))


@pytest.fixture(scope="module")
def found(root: Path) -> Callable[[str], Mapping[str, Run]]:
    """The rows of a comparison, on small data."""
    return cache(
        lambda name: rows(FOLDER / f"{name}.yaml", f"--data.init_args.root={root}", *SMALL)
    )


def narrowed(runs: Sequence[Run], channels: int = 2) -> Sequence[Run]:
    """Networks of a few channels."""
    for run in runs:
        given = run.config["model"]["init_args"]
        given["encoder"]["init_args"]["filters"] = [channels] * 2
        for task in given["tasks"]:
            task["init_args"]["in_channels"] = channels
    return runs


def test_the_table_has_every_row(found) -> None:
    expected = {name for method in METHODS for name in (method, f"F-{method}")}
    assert set(found("compare")) == expected | {f"single-task {task}" for task in TASKS}


def test_it_is_the_published_protocol(found) -> None:
    base = yaml.safe_load((FOLDER / "base.yaml").read_text())
    assert base["trainer"]["max_epochs"] == 200
    given = base["model"]["init_args"]
    assert given["optimizer"]["init_args"] == {"lr": 1e-4}
    assert given["lr_scheduler"]["init_args"] == {"step_size": 100, "gamma": 0.5}
    assert base["data"]["init_args"] | {"root": ""} == {
        "root": "",
        "batch_size": 2,
        "val_fraction": 0.0,
    }
    for run in found("compare").values():
        assert run.select.count == 10
        for callback in run.config["trainer"].get("callbacks") or ():
            if callback["class_path"].endswith("TaskSAM"):
                assert (callback["init_args"]["rho"], callback["init_args"]["adaptive"]) == (
                    2,
                    True,
                )


def test_a_single_task_has_its_own_attention_alone(found) -> None:
    for task in TASKS:
        given = found("compare")[f"single-task {task}"].config["model"]["init_args"]
        assert given["encoder"]["init_args"]["tasks"] == [task]
        (entry,) = given["tasks"]
        assert entry["init_args"]["name"] == task
        single = found("single_task")[f"single-task {task}"].config["model"]["init_args"]
        assert single["encoder"]["class_path"].endswith("SegNet")


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("compare", ("LS", "F-CAGrad", "single-task normals")),
        ("single_task", ("single-task depth",)),
    ],
)
def test_two_steps(found, tmp_path, name, chosen) -> None:
    runs = found(name)
    two_steps(narrowed([runs[row] for row in chosen]), tmp_path)


def test_two_steps_of_the_dilated_network(root, tmp_path) -> None:
    small = tmp_path / "small.yaml"
    settings = yaml.safe_load((FOLDER / "deeplab.yaml").read_text())
    given = settings["model"]["init_args"]
    given["encoder"]["init_args"] = {"width": 2}
    for task in given["tasks"]:
        task["init_args"]["head"]["init_args"]["in_channels"] = 64
    small.write_text(yaml.safe_dump(settings))
    files = [f"--config={path}" for path in (FOLDER / "base.yaml", small)]
    flat = ["--trainer.callbacks+=CAGrad", "--trainer.callbacks+=TaskSAM"]
    root_of_data = f"--data.init_args.root={root}"
    main(["fit", *files, root_of_data, *SMALL, *QUIET, *flat, "--trainer.fast_dev_run=2"])
