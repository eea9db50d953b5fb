"""A bar for each method: the mean of a metric, its deviation and the single seeds."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_flatmtl.comparison.figures.canvas import canvas, name_of, pale
from lightning_flatmtl.comparison.figures.styles import Style
from lightning_flatmtl.comparison.settings import SINGLE_TASK
from lightning_flatmtl.comparison.summary import DELTA_M, Column, Figure, Summary
from lightning_flatmtl.comparison.table import shown

__all__ = ["draw_bars", "words_of"]

_BETWEEN_FAMILIES = 0.4
_NARROW = 0.4
"""Where the values lie in less than this share of the axis, it does not begin at zero."""


def draw_bars(summary: Summary, column: Column, styles: Mapping[str, Style]) -> Any:
    """Draw a column of the table; ``None`` if no method has a value."""
    bars = _bars(summary, column)
    values = {m: [v * column.scale for v in f.by_seed.values()] for m, f in bars.items() if f}
    if not values:
        return None
    places = _places(list(bars), styles)
    figure = canvas(7.0, 1.4 + 0.28 * (places[-1] + 1))
    axes = figure.subplots()
    for (method, value), y in zip(bars.items(), places, strict=True):
        if value is not None:
            _draw_bar(axes, y, value, column, styles[method])
        text = _text(value, column, summary)
        axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), va="center", size="small")
    axes.set_yticks(places, [name_of(method) for method in bars])
    axes.set_ylim(places[-1] + 0.7, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _set_range(axes, [v for each in values.values() for v in each], bars, column)
    return figure


def words_of(column: Column, between: str = " ") -> str:
    """What a metric's axis is called."""
    delta_m = r"$\Delta_m$ over single-task training [%]"
    name = delta_m if column.name == DELTA_M else name_of(column.heading)
    better = {True: "(higher is better)", False: "(lower is better)"}
    if column.higher_is_better is None:
        return name
    return f"{name}{between}{better[column.higher_is_better]}"


def _bars(summary: Summary, column: Column) -> dict[str, Figure | None]:
    """The values to draw, in the order of the table; ``None`` for a method whose runs failed."""
    found: dict[str, Figure | None] = {}
    for method, figures in summary.figures.items():
        if column.name in figures and (method, column.name) != (SINGLE_TASK, DELTA_M):
            found[method] = figures[column.name]
    for row in summary.failures:
        if row["method"] not in summary.figures and row["method"] != SINGLE_TASK:
            found[row["method"]] = None
    return found


def _places(methods: Sequence[str], styles: Mapping[str, Style]) -> list[float]:
    """Where the bars are, with a gap between families."""
    places = [0.0]
    for before, method in pairwise(methods):
        apart = styles[before].family != styles[method].family
        places.append(places[-1] + 1 + _BETWEEN_FAMILIES * apart)
    return places


def _draw_bar(axes: Any, y: float, value: Figure, column: Column, style: Style) -> None:
    mean, std = value.mean * column.scale, (value.std or 0.0) * column.scale
    if math.isfinite(mean):
        shade = style.colour if style.filled else pale(style.colour)
        line = "white" if style.filled else style.colour
        axes.barh(y, mean, height=0.74, facecolor=shade, linewidth=0)
        if style.hatch:
            hatch = {"hatch": style.hatch, "edgecolor": line}
            axes.barh(y, mean, height=0.74, facecolor="none", linewidth=0, **hatch)
        axes.barh(y, mean, height=0.74, facecolor="none", edgecolor=style.colour, linewidth=0.9)
        if std > 0 and math.isfinite(std):
            for colour, width in (("white", 2.6), ("0.1", 1.2)):  # seen on dark bars too
                axes.errorbar(
                    mean, y, xerr=std, color=colour, elinewidth=width, capthick=width, capsize=3
                )
    seeds = [v * column.scale for v in value.by_seed.values()]
    if len(seeds) > 1:
        spread = [y + offset for offset in _offsets(len(seeds))]
        axes.scatter(
            [v if math.isfinite(v) else math.nan for v in seeds],
            spread, s=9, color="white", edgecolor="0.1", linewidth=0.5, zorder=4,
        )  # fmt: skip


def _offsets(number: int) -> list[float]:
    """Above and below the error bar in turn, within the bar."""
    further = 0.16 / max(1, (number - 1) // 2)
    return [(-1 if i % 2 else 1) * (0.13 + i // 2 * further) for i in range(number)]


def _text(value: Figure | None, column: Column, summary: Summary) -> str:
    if value is None:
        return "failed"
    text = shown(value.mean, column, summary)
    return text if value.std is None else f"{text} ± {shown(value.std, column, summary)}"


def _set_range(
    axes: Any, values: Sequence[float], bars: Mapping[str, Figure | None], column: Column
) -> None:
    """Begin at zero, or say that the axis does not."""
    ends = [v for v in values if math.isfinite(v)]
    for bar in bars.values():
        if bar is not None and bar.std is not None:
            ends += [
                end
                for end in (
                    (bar.mean - bar.std) * column.scale,
                    (bar.mean + bar.std) * column.scale,
                )
                if math.isfinite(end)
            ]
    label = words_of(column)
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if column.name != DELTA_M and 0 < high - low < _NARROW * low:
        begin = _rounded_down(low - 0.25 * (high - low), high - low)
        axes.set_xlim(begin, high + 0.06 * (high - begin))
        label += f"\nThe axis begins at {begin:g}, not at 0."
    else:
        margin = 0.06 * (max(high, 0.0) - min(low, 0.0)) or 1.0
        axes.set_xlim(low - margin if low < 0 else 0.0, 0.0 if high <= 0 > low else high + margin)
        if low < 0:
            axes.axvline(0.0, color="0.2", linewidth=0.9)
    several = any(bar is not None and bar.std is not None for bar in bars.values())
    if several:
        label += "\nBars: mean over seeds ± standard deviation; dots: single seeds."
    axes.set_xlabel(label)


def _rounded_down(value: float, width: float) -> float:
    """A round number below."""
    unit = 10.0 ** math.floor(math.log10(width))
    return max(0.0, math.floor(value / unit) * unit)
