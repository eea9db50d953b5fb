"""The pictures of LossLandscape: curves in one dimension, contours in two."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite, sqrt
from pathlib import Path
from typing import Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS, is_wide

__all__ = ["draw_curves", "draw_surfaces"]

_MOST = len(COLOURS)
"""Tasks that are told apart by colour alone; as many more have other lines, too."""
_LINES = ("-", "--")


def draw_curves(
    losses: Mapping[str, Sequence[float]], axis: Sequence[float], data: str, path: Path
) -> None:
    """Draw a curve for each task.

    Args:
        losses: By task the loss at every point of the axis.
        axis: The points, in norms of filters.
        data: What was looked at.
        path: The file, PNG.
    """
    figure = _figure(6.4, 4.2)
    panel = figure.subplots()
    for i, (task, curve) in enumerate(losses.items()):
        finite = [loss if isfinite(loss) else float("nan") for loss in curve]
        if len(losses) > _MOST * len(_LINES):
            label = f"each of {len(losses)} tasks" if i == 0 else None
            panel.plot(axis, finite, color="0.6", linewidth=0.8, label=label)
        else:
            panel.plot(
                axis,
                finite,
                color=COLOURS[i % _MOST],
                linestyle=_LINES[i // _MOST],
                marker=MARKERS[i % _MOST],
                markevery=max(1, len(axis) // 10),
                ms=4,
                label=task,
            )
    if len(losses) > _MOST * len(_LINES):
        means = [sum(at) / len(at) for at in zip(*losses.values(), strict=True)]
        panel.plot(axis, means, color=COLOURS[0], linewidth=2.2, label="mean of the tasks")
    if is_wide([loss for curve in losses.values() for loss in curve]):
        panel.set_yscale("log")
    panel.axvline(0.0, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    panel.set(
        title=f"Loss along a random direction, {data}",
        xlabel="distance / norm of each filter",
        ylabel="loss of the task",
    )
    panel.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def draw_surfaces(
    losses: Mapping[str, Sequence[float]], axis: Sequence[float], data: str, path: Path
) -> None:
    """Draw a filled contour for each task.

    Args:
        losses: By task the loss at every point of the grid, the second axis moving fastest.
        axis: The points along each axis, in norms of filters.
        data: What was looked at.
        path: The file, PNG.
    """
    columns = min(len(losses), max(3, ceil(sqrt(len(losses)))))
    rows = ceil(len(losses) / columns)
    figure = _figure(3.9 * columns + 0.4, 3.4 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, (task, surface) in zip(panels, losses.items(), strict=False):
        _draw_surface(figure, panel, surface, axis)
        panel.set(title=task, aspect="equal")
    for panel in panels[len(losses) :]:
        panel.set_axis_off()
    figure.supxlabel("distance along the first direction / norm of each filter", fontsize="medium")
    figure.supylabel("along the second direction", fontsize="medium")
    lost = any(not isfinite(loss) for surface in losses.values() for loss in surface)
    title = f"Loss of each task around the parameters (+),{_between(columns)}{data}"
    note = f"{_between(columns)}(white: not finite)" if lost else ""
    figure.suptitle(title + note, fontsize="medium")
    figure.savefig(path, dpi=150)


def _between(columns: int) -> str:
    return "\n" if columns == 1 else " "


def _draw_surface(figure: Any, panel: Any, surface: Sequence[float], axis: Sequence[float]) -> None:
    import numpy as np  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    n = len(axis)
    grid = np.asarray(surface, dtype=float).reshape(n, n).T  # the first axis to the right
    grid = np.ma.masked_invalid(grid)
    if grid.count() and grid.min() < grid.max():
        low, high = float(grid.min()), float(grid.max())
        wide = is_wide(surface)
        levels = np.geomspace(low, high, 15) if wide else np.linspace(low, high, 15)
        norm = LogNorm(low, high) if wide else None
        filled = panel.contourf(axis, axis, grid, levels=levels, norm=norm, cmap="cividis")
        panel.contour(axis, axis, grid, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        bar = figure.colorbar(filled, ax=panel, format="%.3g", ticks=levels[::2], shrink=0.85)
        bar.set_label("loss")
    else:
        words = "the same loss everywhere" if grid.count() else "no finite loss"
        panel.text(0.5, 0.62, words, ha="center", transform=panel.transAxes)
        panel.set(xlim=(axis[0], axis[-1]), ylim=(axis[0], axis[-1]))
    panel.plot(0.0, 0.0, marker="+", color="white", ms=9, mew=3.0)
    panel.plot(0.0, 0.0, marker="+", color="black", ms=8, mew=1.4)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Without pyplot: no window, and the user's own figures stay as they are.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
