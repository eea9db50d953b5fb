"""Multi-MNIST: every file, plain and flat."""

import csv
import runpy
from pathlib import Path

import pytest
import yaml

from lightning_flatmtl.comparison.curves import TRAIN_LOSS, Curves
from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers.multimnist import write

FOLDER = EXAMPLES / "multimnist"
COMPARISONS = sorted([*FOLDER.glob("compare*.yaml"), *FOLDER.glob("tune*.yaml")])
SMALL = [
    "--trainer.accelerator=cpu",
    "--data.train_pairs=16",
    "--data.val_pairs=4",
    "--data.test_pairs=4",
    "--data.val_images=20",
    "--data.batch_size=4",
]


OWN_VARIANT = ("compare_cost", "compare_lenet_fashion", "tune_small")
OWN_ROWS = ("compare_cost", "tune_small")


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        pytest.param(path, variant, id=f"{path.stem} {variant}")
        for path in COMPARISONS
        for variant in (["fashion"] if path.stem in OWN_VARIANT else ["mnist", "fashion", "mixed"])
    ],
)
def test_rows(path: Path, variant: str, tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    narrow = [] if "lenet" in path.stem else ["--model.encoder.width=4"]
    first, *_, last = yaml.safe_load(path.read_text("utf-8"))["methods"]
    assert first in {"LS", "CAGrad"}
    assert last.startswith(("F-", "SAMO-"))
    # Each flat row is the plain row and the same radius; two of them say that the file runs.
    given = [*SMALL, *narrow, f"--data.root={root}"]
    if path.stem not in OWN_VARIANT:
        given.append(f"--data.variant={variant}")
    runs = rows(path, *given, only=[first, last])
    data = [run.config["data"]["init_args"]["variant"] for run in runs.values()]
    assert data == [variant, variant]
    two_steps(list(runs.values()), tmp_path)


def test_the_tables_have_every_row() -> None:
    flat = {"rho": 2.0, "adaptive": True}
    runs = rows(FOLDER / "compare.yaml")
    for method in ("LS", "MGDA", "PCGrad", "CAGrad", "IMTL", "NashMTL", "FairGrad"):
        plain, own = (
            [c["class_path"].rpartition(".")[2] for c in runs[name].config["trainer"]["callbacks"]]
            for name in (method, f"F-{method}")
        )
        assert own == [*plain, "TaskSAM"]
        given = runs[f"F-{method}"].config["trainer"]["callbacks"][-1]["init_args"]
        assert {name: given[name] for name in flat} == flat
    assert {"single-task left", "single-task right"} <= set(runs)
    for other in COMPARISONS:
        methods = yaml.safe_load(other.read_text("utf-8"))["methods"]
        assert set(methods) <= set(runs) or other.stem in OWN_ROWS


def write_run(folder: Path, method: str, seed: int, accuracies: list[float]) -> dict[str, object]:
    """Two tasks with accuracies a and a + 0.1; validated after every second epoch."""
    code = f"{len(method):08x}"
    run = folder / "runs" / f"{method}-seed{seed}-{code}"
    run.mkdir(parents=True)
    curves = Curves()
    for k, accuracy in enumerate(accuracies):
        figures = {"a/accuracy": accuracy, "b/accuracy": accuracy + 0.1, "loss": 2 - accuracy}
        curves.add(2 * k, 0, {TRAIN_LOSS: 1.0})
        curves.add(
            2 * k + 1, 0, {TRAIN_LOSS: 1.0} | {f"val/{n}": value for n, value in figures.items()}
        )
    curves.write(run / "curves.csv")
    return {"method": method, "task": "", "seed": seed, "status": "done", "hash": f"{code}ff"}


def test_equal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        write_run(tmp_path, "CAGrad", 0, [0.2, 0.6, 0.5, 0.4]),
        write_run(tmp_path, "CAGrad", 1, [0.2, 0.3, 0.7, 0.6]),
        write_run(tmp_path, "F-CAGrad", 0, [0.3, 0.5, 0.6, 0.7]),
        write_run(tmp_path, "F-CAGrad", 1, [0.3, 0.5, 0.6, 0.7]),
    ]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr("sys.argv", ["equal_time.py", str(tmp_path)])
    runpy.run_path(str(FOLDER / "equal_time.py"), run_name="__main__")
    table = {
        cells[1]: cells[2:5]
        for cells in (
            [c.strip() for c in row.split("|")] for row in capsys.readouterr().out.split("\n")[2:-1]
        )
    }
    # 8 epochs; with two tasks a step of F-CAGrad takes 11 passes instead of 5: 3.6 epochs.
    assert table == {
        "CAGrad": ["8", "55.00 ± 14.14", "0.750 ± 0.071"],
        "CAGrad, at its best": ["5", "70.00 ± 7.07", "0.675 ± 0.035"],
        "F-CAGrad, equal epochs": ["8", "75.00 ± 0.00", "0.650 ± 0.000"],
        "F-CAGrad, equal time": ["2", "35.00 ± 0.00", "0.850 ± 0.000"],
        "F-CAGrad, at its best": ["8", "75.00 ± 0.00", "0.650 ± 0.000"],
    }
