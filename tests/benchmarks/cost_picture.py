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

PLAIN = ("LS", "CAGrad")
"""What the others are to be better than."""


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
    columns = ["method", "cost over CAGrad", "accuracy [%]", f"against {full}", "seeds"]
    if not cost:
        columns.remove("cost over CAGrad")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method, values in found.items():
        pairs = list(zip(found[full], values, strict=False))
        less = statistics.fmean(b - a for a, b in pairs)
        cells = [
            method,
            *([f"{cost[method]:.2f}"] if method in cost else []),
            f"{statistics.fmean(values):.2f} ± {deviation(values):.2f}",
            f"{less:+.2f}",
            str(len(values)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: dict[str, list[float]], cost: dict[str, float], tasks: int) -> Figure:
    """Two panels: the methods that have gained, close up, and all others below them."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    means = {method: statistics.fmean(values) for method, values in found.items()}
    best = max(means.values())
    border = best - 0.4 * (best - min(means[m] for m in means if m in PLAIN))
    for i, method in enumerate(method for method in found if method in cost):
        axes = top if means[method] > border else bottom
        error = deviation(found[method]) / len(found[method]) ** 0.5
        sums = method.startswith(("LS", "F-LS"))
        axes.errorbar(
            cost[method],
            means[method],
            yerr=error if axes is top else None,
            fmt="s" if sums else "^" if method.startswith("SAMO") else "o",
            color=f"C{i % 10}",
            fillstyle="full" if i < 10 else "none",
            label=f"{i + 1}  {method}",
        )
        axes.annotate(
            str(i + 1),
            (cost[method], means[method]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize="small",
        )
    bottom.set_xlabel(f"time of a step over plain CAGrad ({tasks} tasks)")
    top.set_ylabel("average test accuracy [%]\n(mean, standard error)")
    bottom.margins(y=0.35)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--costs", type=Path, help="without it, the table only")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--full", default="F-CAGrad")
    parser.add_argument("--out", type=Path, default=Path("cost.png"))
    arguments = parser.parse_args()
    found = accuracies(arguments.results)
    cost = {} if arguments.costs is None else costs(arguments.costs, arguments.tasks)
    print(table(found, cost, arguments.full))
    if not cost:
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(found, cost, arguments.tasks).savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
