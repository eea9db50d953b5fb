"""The picture of Calibration: for every task its reliability, its confidences, its entropies."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_flatmtl.callbacks._calibration_sums import Finding
from lightning_flatmtl.callbacks._pictures import COLOURS

__all__ = ["draw_calibration"]

_MOST = 12
"""Tasks in a picture."""
_COLUMNS = 2


def draw_calibration(findings: Sequence[Finding], path: Path) -> None:
    """Draw the figures of an evaluation.

    Args:
        findings: Those of every task.
        path: The file, PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = list(findings)
    if len(shown) > _MOST:
        worst = sorted(shown, key=lambda f: -f.figures["ece"])[:_MOST]
        shown = [finding for finding in shown if finding in worst]
    columns = min(len(shown), _COLUMNS)
    rows = math.ceil(len(shown) / _COLUMNS)
    # Without pyplot: no window, and the user's own figures stay as they are.
    figure = Figure(figsize=(7.6 * columns, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(rows, columns, squeeze=False, wspace=0.04, hspace=0.04)
    for finding, part in zip(shown, parts.flat, strict=False):
        _draw_task(finding, part)
    if len(shown) < len(findings):
        figure.suptitle(f"The {_MOST} of {len(findings)} tasks with the greatest ECE")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_task(finding: Finding, part: Any) -> None:
    figures = finding.figures
    part.suptitle(
        f"{finding.task}: ECE {figures['ece']:.3f}, Brier score {figures['brier']:.3f}",
        fontsize="large",
    )
    grid = part.add_gridspec(2, 2, height_ratios=(2.6, 1), width_ratios=(1.15, 1))
    reliability = part.add_subplot(grid[0, 0])
    counts = part.add_subplot(grid[1, 0], sharex=reliability)
    _draw_reliability(finding, reliability)
    _draw_counts(finding, counts)
    _draw_entropies(finding, part.add_subplot(grid[:, 1]))


def _draw_reliability(finding: Finding, axes: Any) -> None:
    width = 1 / len(finding.bins)
    at = [(i, row) for i, row in enumerate(finding.bins) if row[0]]
    x = [(i + 0.5) * width for i, _ in at]
    confidences = [row[1] for _, row in at]
    shares = [row[2] for _, row in at]
    binary = finding.kind == "binary"
    name = "share of class 1" if binary else "accuracy"
    style: dict[str, Any] = {"width": 0.94 * width, "linewidth": 0.8}
    fill = (*_rgb(COLOURS[0]), 0.5)
    axes.bar(x, shares, color=fill, edgecolor=COLOURS[0], label=name, **style)
    axes.bar(
        x,
        [c - s for c, s in zip(confidences, shares, strict=True)],
        bottom=shares,
        color="none",
        edgecolor=COLOURS[1],
        hatch="////",
        label="gap to the mean confidence",
        **style,
    )
    axes.plot([0, 1], [0, 1], color="0.3", linewidth=1, linestyle="--", label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel=name)
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    _legend(axes, columns=2)


def _draw_counts(finding: Finding, axes: Any) -> None:
    width = 1 / len(finding.bins)
    total = sum(count for count, *_ in finding.bins)
    x = [(i + 0.5) * width for i in range(len(finding.bins))]
    shares = [100 * count / total for count, *_ in finding.bins]
    axes.bar(x, shares, width=0.94 * width, color="0.55")
    what = "probability of class 1" if finding.kind == "binary" else "confidence"
    axes.set(xlabel=f"{what}, {total:,.0f} samples", ylabel="samples [%]")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _draw_entropies(finding: Finding, axes: Any) -> None:
    figures = finding.figures
    series = [("in domain", finding.entropies, figures["entropy"], "-")]
    if finding.ood_entropies:
        of_ood = finding.ood_entropies, figures["ood_entropy"], "--"
        series.append(("out of domain", *of_ood))
    greatest = math.log(finding.classes)
    for (name, histogram, mean, line), colour in zip(series, COLOURS, strict=False):
        total = sum(histogram)
        edges = [greatest * i / len(histogram) for i in range(len(histogram) + 1)]
        axes.stairs(
            [100 * count / total for count in histogram],
            edges,
            fill=True,
            color=(*_rgb(colour), 0.25),
            edgecolor=colour,
            linestyle=line,
            linewidth=1.6,
            label=f"{name}, mean {mean:.2f}",
        )
        axes.axvline(mean, color=colour, linestyle=line, linewidth=1)
    axes.set(
        xlim=(0, greatest),
        ylim=(0, None),
        xlabel=f"predictive entropy [nats], at most ln {finding.classes}",
        ylabel="samples [%]",
    )
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    _legend(axes, columns=1)


def _legend(axes: Any, columns: int) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        fontsize="small",
        frameon=False,
        borderaxespad=0.2,
    )


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
