"""Draws accuracy against cost, and prints the table of both: docs/cost.md.

    python -m tests.benchmarks.cost_picture --costs flatness_cost.csv --tasks 2
        --results runs/compare_cost/results.csv --full F-CAGrad --out docs/images/cost.png

Cost is what tests.benchmarks.flatness_cost has measured, over the plain gradient method. Accuracy
is the average of the tasks' test accuracies, mean and standard deviation over the seeds of
``flatmtl compare``.
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def accuracies(path: Path) -> dict[str, list[float]]:
    """Percent, by method, one for each seed that is done."""
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "done" and not row["method"].startswith("single task"):
                names = [n for n in row if n.startswith("test/") and n.endswith("/accuracy")]
                values = [float(row[n]) for n in names if row[n] and n != "test/average/accuracy"]
                found.setdefault(row["method"], []).append(100 * statistics.fmean(values))
    return found


def costs(path: Path, tasks: int) -> dict[str, float]:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["tasks"]) == tasks]
    return {row["method"]: float(row["over plain"]) for row in rows}


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(found: dict[str, list[float]], cost: dict[str, float], full: str) -> str:
    """Markdown; the difference to the full method is taken seed by seed."""
    lines = [
        "| method | cost over CAGrad | accuracy [%] | less than full | seeds |",
        "|---|---|---|---|---|",
    ]
    for method, values in found.items():
        pairs = list(zip(found[full], values, strict=False))
        less = statistics.fmean(b - a for a, b in pairs)
        of_method = f"{cost[method]:.2f}" if method in cost else ""
        accuracy = f"{statistics.fmean(values):.2f} ± {deviation(values):.2f}"
        lines.append(f"| {method} | {of_method} | {accuracy} | {less:+.2f} | {len(values)} |")
    return "\n".join(lines)


def picture(found: dict[str, list[float]], cost: dict[str, float], tasks: int) -> Figure:
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = [method for method in found if method in cost]
    for i, method in enumerate(drawn):
        sums = method.startswith(("LS", "F-LS"))
        axes.errorbar(
            cost[method],
            statistics.fmean(found[method]),
            yerr=deviation(found[method]),
            fmt="s" if sums else "^" if method.startswith("SAMO") else "o",
            color=f"C{i % 10}",
            fillstyle="full" if i < 10 else "none",
            capsize=3,
            label=method,
        )
    axes.set_xlabel(f"time of a step over plain CAGrad ({tasks} tasks)")
    axes.set_ylabel("average test accuracy [%]")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--full", default="F-CAGrad")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found, cost = accuracies(arguments.results), costs(arguments.costs, arguments.tasks)
    print(table(found, cost, arguments.full))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(found, cost, arguments.tasks).savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
