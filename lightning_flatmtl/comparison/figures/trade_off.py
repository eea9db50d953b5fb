"""What a method gains against what it costs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from lightning_flatmtl.comparison.figures.bars import words_of
from lightning_flatmtl.comparison.figures.canvas import canvas, legend_beside, name_of
from lightning_flatmtl.comparison.figures.styles import Style
from lightning_flatmtl.comparison.summary import COST, DELTA_M, Column, Figure, Summary

__all__ = ["draw_trade_off", "gain_column"]

_FENCE = 1.5
"""So many interquartile ranges beside the quartiles, on the bad side, a method may be off the axis.
"""

_SQUEEZED = 1 / 3
"""It is so where it would leave the others less than this share of the axis."""

Points = dict[str, tuple[Figure, Figure]]
"""Cost and gain by method."""


def gain_column(summary: Summary) -> Column | None:
    """What is drawn against cost: Delta_m, or else the first average; ``None`` without either."""
    by_name = {column.name: column for column in summary.columns}
    averages = (column for column in summary.columns if column.name.startswith("average/"))
    return by_name.get(DELTA_M) or next(averages, None)


def draw_trade_off(summary: Summary, column: Column, styles: Mapping[str, Style]) -> Any:
    """Draw a column against cost; ``None`` if no method has both."""
    points = _points(summary, column.name)
    if not points:
        return None
    figure = canvas(7.6, max(4.2, 0.6 + 0.21 * min(len(points), 30)))
    axes = figure.subplots()
    means = [gain.mean * column.scale for _, gain in points.values()]
    low, high = _limits(means, column.higher_is_better)
    names, several = [], False
    for method, (cost, gain) in points.items():
        mean = gain.mean * column.scale
        far = not low <= mean <= high
        several = several or gain.std is not None
        names.append(f"{name_of(method)}: {mean:.1f}, off the axis" if far else name_of(method))
        if not far:
            _draw_point(axes, cost, gain, column.scale, styles[method])
            _join(axes, points.get(styles[method].family), (cost, gain), column, styles[method])
    if column.name == DELTA_M:
        axes.axhline(0.0, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    reference = name_of(summary.reference or "the first method")
    words = f"cost: seconds per step over those of {reference} (lower is better)"
    if several:
        words += "\nMean ± standard deviation over seeds."
    axes.set(xlabel=words, ylabel=words_of(column, "\n"))
    axes.grid(alpha=0.3)
    axes.margins(0.06)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))  # no cost is less than nothing
    legend_beside(figure, [_handle(styles[method]) for method in points], names)
    return figure


def _points(summary: Summary, name: str) -> Points:
    """The methods that have both."""
    found = {m: (f[COST], f[name]) for m, f in summary.figures.items() if COST in f and name in f}
    return {
        method: point
        for method, point in found.items()
        if math.isfinite(point[0].mean) and math.isfinite(point[1].mean)
    }


def _limits(means: Sequence[float], higher_is_better: bool | None) -> tuple[float, float]:
    """The range of what is drawn; what failed may be left out, so that the others can be seen."""
    whole = min(means), max(means)
    if len(means) < 5 or higher_is_better is None:
        return whole
    first, _, third = statistics.quantiles(means, n=4, method="inclusive")
    fence = _FENCE * (third - first)
    if higher_is_better:
        inside = min(mean for mean in means if mean >= first - fence), whole[1]
    else:
        inside = whole[0], max(mean for mean in means if mean <= third + fence)
    squeezed = inside[1] - inside[0] < _SQUEEZED * (whole[1] - whole[0])
    return inside if squeezed else whole


def _draw_point(axes: Any, cost: Figure, gain: Figure, scale: float, style: Style) -> None:
    axes.errorbar(
        cost.mean, gain.mean * scale, xerr=_error(cost, 1.0), yerr=_error(gain, scale),
        color=style.colour, elinewidth=0.9, capsize=2, zorder=2, **_look(style),
    )  # fmt: skip


def _join(
    axes: Any,
    plain: tuple[Figure, Figure] | None,
    own: tuple[Figure, Figure],
    column: Column,
    style: Style,
) -> None:
    """A thin line from a method to what flatness makes of it."""
    if plain is not None and style.filled and not style.hatch:
        ends = [[plain[i].mean, own[i].mean] for i in (0, 1)]
        gains = [gain * column.scale for gain in ends[1]]
        axes.plot(ends[0], gains, color=style.colour, linewidth=0.9, alpha=0.5, zorder=1)


def _error(figure: Figure, scale: float) -> float | None:
    std = figure.std
    return None if std is None or not math.isfinite(std) else std * scale


def _look(style: Style) -> dict[str, Any]:
    return {
        "marker": style.marker,
        "markersize": 8.5 if style.filled else 7.5,
        "linestyle": "none",
        "markerfacecolor": style.colour if style.filled else "white",
        "markeredgecolor": "white" if style.filled else style.colour,
        "markeredgewidth": 0.5 if style.filled else 1.4,
    }


def _handle(style: Style) -> Line2D:
    return Line2D([], [], **_look(style))
