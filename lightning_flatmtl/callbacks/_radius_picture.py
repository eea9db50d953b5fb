"""The picture of RhoFinder: the loss of every task against the radius."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "draw_radii"]

Curve = Sequence[tuple[float, float]]

_PARTS = {"shared": "shared parameters", "head": "heads"}
_MOST = len(COLOURS)
"""Tasks that are told apart by colour; more are drawn alike."""
_ROOM = 1.6
"""How far above the highest first loss a panel goes."""


def draw_radii(
    panels: Mapping[tuple[str, bool], Mapping[str, Curve]],
    begin: Mapping[str, float],
    suggested: Mapping[bool, float | None],
    title: str,
    png: str | Path | None,
) -> "Figure":
    """Draw a panel for each part that is perturbed and each kind of perturbation.

    Args:
        panels: By part and whether it is adaptive, by task the losses against the radius.
        begin: The loss of every task before training.
        suggested: The radius, by whether it is adaptive.
        title: What was looked at, and when.
        png: A file to write to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    parts = list(dict.fromkeys(part for part, _ in panels))
    kinds = sorted({adaptive for _, adaptive in panels})
    figure = Figure(figsize=(0.9 + 4.2 * len(kinds), 0.9 + 3.0 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts), len(kinds), squeeze=False)
    for i, part in enumerate(parts):
        for j, adaptive in enumerate(kinds):
            panel = axes[i][j]
            _draw(panel, panels[part, adaptive], begin)
            radius = suggested[adaptive]
            if radius is not None:
                label = f"suggested: {radius:g}" if i == 0 else None
                panel.axvline(radius, color="0.15", linestyle="--", linewidth=1.1, label=label)
            kind = "adaptive" if adaptive else "plain"
            panel.set(xscale="log", title=f"{_PARTS[part]}, {kind}", xlabel="radius", ylabel="loss")
            panel.grid(alpha=0.25)
            panel.legend(frameon=False, fontsize="small", loc="upper left")
    figure.suptitle(f"Losses at perturbed parameters, {title}", fontsize="medium")
    if png is not None:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=150)
    return figure


def _draw(panel: Any, curves: Mapping[str, Curve], begin: Mapping[str, float]) -> None:
    lowest = []
    for i, (task, curve) in enumerate(curves.items()):
        finite = [(rho, loss) for rho, loss in curve if isfinite(loss)]
        if not finite:
            continue
        style: dict[str, Any] = {"color": COLOURS[i % _MOST], "marker": MARKERS[i % _MOST]}
        if len(curves) > _MOST:
            style = {"color": "0.5", "linewidth": 0.8}
        label = task
        if len(curves) > _MOST:
            label = "_" if i else f"each of {len(curves)} tasks"  # hidden from the legend
        panel.plot(*zip(*finite, strict=True), ms=3.5, label=label, **style)
        lowest.append(min(loss for _, loss in finite))
        if len(curves) <= _MOST:
            panel.axhline(begin[task], color=style["color"], linestyle=":", linewidth=1.0)
    panel.plot([], [], color="0.4", linestyle=":", linewidth=1.0, label="before training")
    if lowest:
        top = max(begin[task] for task in curves)
        bottom = min(lowest)
        span = max(top - bottom, 1e-12)
        panel.set_ylim(bottom - 0.08 * span, bottom + _ROOM * span)
