"""Compare every F-X with its X at equal epochs and at equal time, from a finished comparison.

    python examples/multimnist/equal_time.py runs/multimnist/compare_small_fashion

The learning rate is constant, so that a run stopped after k epochs is a run of k epochs. Time is
counted in what a step has to compute, not on a clock that other programs share: in forward passes,
a backward pass as two. With m tasks the plain sum takes 1 + 2, a gradient method 1 + 2 m, and with
TaskSAM m forward and m backward passes more: 1 + 2 m + 3 m. Rows "at its best" are at the
epoch with the smallest validation loss. All figures are of validation data, as ``curves.csv`` of
every run has them; means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from lightning_flatmtl.comparison.curves import read_curves

Curve = dict[int, dict[str, float]]


def passes(method: str, tasks: int) -> int:
    """Forward passes of a step, a backward pass as two."""
    plain = 3 if method in {"LS", "F-LS"} else 1 + 2 * tasks
    return 1 + 5 * tasks if method.startswith("F-") else plain


def curve_of(run: Path) -> Curve:
    """Accuracy (mean over tasks) and loss of the validations, by the number of epochs trained."""
    values = read_curves(run / "curves.csv")
    accuracies = [
        of_epochs
        for name, of_epochs in values.items()
        if name.startswith("val/") and name.endswith("/accuracy")
    ]
    return {
        epoch + 1: {
            "accuracy": 100 * fmean(of_epochs[epoch] for of_epochs in accuracies),
            "loss": loss / len(accuracies),
        }
        for epoch, loss in values["val/loss"].items()
    }


def curves(folder: Path) -> dict[str, dict[int, Curve]]:
    """The curves of the runs that are done, by method and seed."""
    found: dict[str, dict[int, Curve]] = defaultdict(dict)
    with (folder / "results.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "done" and not row["task"]:
                (run,) = folder.glob(f"runs/*-seed{row['seed']}-{row['hash'][:8]}")
                found[row["method"]][int(row["seed"])] = curve_of(run)
    return found


def at(curve: Curve, epochs: float) -> tuple[int, dict[str, float]]:
    """The last validation within that many epochs."""
    epoch = max(e for e in curve if e <= epochs)
    return epoch, curve[epoch]


def best(curve: Curve) -> tuple[int, dict[str, float]]:
    """The validation with the smallest loss."""
    return min(curve.items(), key=lambda entry: entry[1]["loss"])


def line(method: str, shown: list[tuple[int, dict[str, float]]]) -> str:
    """A row of the table: mean and standard deviation over the seeds."""
    cells = []
    for name, digits in (("accuracy", 2), ("loss", 3)):
        values = [figures[name] for _, figures in shown]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.{digits}f}{spread}")
    epochs = fmean(epoch for epoch, _ in shown)
    return f"| {method} | {epochs:.3g} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=2)
    arguments = parser.parse_args()
    found = curves(arguments.folder)
    print("| method | epochs | val accuracy [%] ↑ | val loss ↓ |")
    print("| --- | ---: | ---: | ---: |")
    for flat, by_seed in found.items():
        plain = flat.removeprefix("F-")
        if plain == flat or plain not in found:
            continue
        whole = min(max(curve) for curve in found[plain].values())
        share = passes(plain, arguments.tasks) / passes(flat, arguments.tasks)
        plains, flats = found[plain].values(), by_seed.values()
        print(line(plain, [at(curve, whole) for curve in plains]))
        print(line(f"{plain}, at its best", [best(curve) for curve in plains]))
        print(line(f"{flat}, equal epochs", [at(curve, whole) for curve in flats]))
        print(line(f"{flat}, equal time", [at(curve, whole * share) for curve in flats]))
        print(line(f"{flat}, at its best", [best(curve) for curve in flats]))


if __name__ == "__main__":
    main()
