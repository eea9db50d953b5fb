"""The picture of NoiseRobustness: losses and metrics against the radius."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS, is_wide

__all__ = ["draw_noise"]

_MOST = len(COLOURS)
"""Tasks that are told apart by colour; more are drawn together."""

Curve = Sequence[tuple[float, float, float]]


def draw_noise(
    metrics: Mapping[str, Mapping[str, Curve]],
    data: str,
    directions: int,
    relative: bool,
    path: Path,
) -> None:
    """Draw a panel for each metric, with a curve for each task.

    Args:
        metrics: By metric and task radius, mean and standard deviation; the task is empty for what
            belongs to none.
        data: What was looked at.
        directions: Over how many directions the means are.
        relative: Whether radii are measured by the norms of filters.
        path: The file, PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(3, len(metrics))
    rows = ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.1 * columns + 0.6, 3.5 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    tasks = list(dict.fromkeys(task for curves in metrics.values() for task in curves if task))
    styles = _styles(tasks)
    for panel, (metric, curves) in zip(panels, metrics.items(), strict=False):
        means = [mean for curve in curves.values() for _, mean, _ in curve if isfinite(mean)]
        wide = is_wide(means)
        floor = min(means) / 2 if wide else None
        for task, curve in curves.items():
            _draw_curve(panel, curve, styles[task], floor)
        if len(tasks) > _MOST and len(curves) > 1:
            _draw_mean(panel, [curve for task, curve in curves.items() if task])
        radius = "radius / norm of each filter" if relative else "radius, L2 norm of the noise"
        panel.set(xlabel=radius, ylabel=metric)
        panel.grid(alpha=0.25)
        if wide:
            panel.set_yscale("log")
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    band = f" (band: ±1 standard deviation over {directions} directions)" if directions > 1 else ""
    title = f"Noise on the weights, {data}"
    figure.suptitle(
        f"{title}{band}" if columns > 1 else f"{title}\n{band.strip()}".strip(), fontsize="medium"
    )
    figure.savefig(path, dpi=150)


def _styles(tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How the curve of each task is drawn; that of no task is dashed."""
    total = {"color": "0.25", "linestyle": "--", "label": "overall"}
    if len(tasks) > _MOST:
        grey = {"color": "0.6", "linewidth": 0.8, "band": False}
        first = {tasks[0]: {**grey, "label": f"each of {len(tasks)} tasks"}}
        return {"": total, **dict.fromkeys(tasks, grey), **first}
    looks = zip(tasks, COLOURS, MARKERS, strict=False)
    return {
        "": total,
        **{t: {"color": c, "marker": marker, "ms": 4, "label": t} for t, c, marker in looks},
    }


def _draw_curve(panel: Any, curve: Curve, style: Mapping[str, Any], floor: float | None) -> None:
    """Draw a curve and its band, which on a logarithmic scale goes no lower than ``floor``."""
    style = dict(style)
    band = style.pop("band", True)
    curve = [(r, mean, std) for r, mean, std in curve if isfinite(mean)]
    x, means = [r for r, _, _ in curve], [mean for _, mean, _ in curve]
    panel.plot(x, means, **style)
    if band:
        low = [mean - std if floor is None else max(mean - std, floor) for _, mean, std in curve]
        high = [mean + std for _, mean, std in curve]
        panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _draw_mean(panel: Any, curves: Sequence[Curve]) -> None:
    x = [r for r, _, _ in curves[0]]
    means = [sum(mean for _, mean, _ in at) / len(at) for at in zip(*curves, strict=True)]
    panel.plot(x, means, color=COLOURS[0], linewidth=2.2, label="mean of the tasks")
