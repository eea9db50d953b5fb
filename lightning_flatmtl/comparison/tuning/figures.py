"""The figures of a search: value over trials, and against each argument. Matplotlib is optional."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.figures.styles import Style, styles_of
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.results import Row
from lightning_flatmtl.comparison.tuning.results import Best
from lightning_flatmtl.comparison.tuning.space import Space

__all__ = ["write_figures"]

_FENCE = 1.5
"""So many interquartile ranges beyond the quartiles, on the bad side, the axis ends."""

_WIDEST = 3
_TOGETHER = 6
"""With more methods than this, lines alone are drawn over the trials, no points."""


class _Picture:
    """What all panels need: rows with a value, styles, and the range of the values."""

    def __init__(
        self, rows: Sequence[Row], metric: str, direction: str, methods: Sequence[str]
    ) -> None:
        states = {"complete", "pruned"}
        self.rows = [r for r in rows if r["state"] in states and r["value"] is not None]
        self.metric, self.highest = metric, direction == "maximize"
        self.styles = styles_of(methods)
        self.methods = [m for m in methods if any(row["method"] == m for row in self.rows)]
        self.low, self.high = _limits([row["value"] for row in self.rows], self.highest)

    def inside(self, value: float) -> float:
        """The value, or where the axis ends."""
        return min(max(value, self.low), self.high)

    @property
    def words(self) -> str:
        """What is to be said of points at the end of the axis, if there are any."""
        beyond = any(row["value"] != self.inside(row["value"]) for row in self.rows)
        return " Points at the end of the axis lie beyond it." if beyond else ""

    def frame(self, axes: Any) -> None:
        """The same range in every panel; what lies beyond is drawn at its end."""
        margin = 0.05 * (self.high - self.low) or 0.5
        axes.set_ylim(self.low - margin, self.high + margin)
        axes.grid(alpha=0.25)


def write_figures(
    folder: Path,
    rows: Sequence[Row],
    best: Mapping[str, Best],
    metric: str,
    direction: str,
    methods: Mapping[str, Mapping[str, Space]],
) -> tuple[str, ...]:
    """Draw a search.

    Args:
        folder: Where the PNG files go.
        rows: The trials.
        best: The best trial of each method.
        metric: What they were chosen by.
        direction: ``"minimize"`` or ``"maximize"``.
        methods: The space of each argument, for each method.

    Returns:
        Why figures are missing, if some are; nothing is raised.
    """
    picture = _Picture(rows, metric, direction, list(methods)) if rows else None
    if picture is None or not picture.rows:
        return ()
    if find_spec("matplotlib") is None:
        return ('No figures without matplotlib: run `pip install "lightning-flatmtl[plots]"`.',)
    from lightning_flatmtl.comparison.figures.canvas import neutral, png  # noqa: PLC0415 # optional

    spaces = {name: space for each in methods.values() for name, space in each.items()}
    drawings: dict[str, Callable[[], Any]] = {"trials": lambda: _draw_trials(picture)}
    if spaces:
        drawings["arguments"] = lambda: _draw_arguments(picture, spaces, best)
    remarks = []
    with neutral():
        for name, draw in drawings.items():
            try:
                write_whole(folder / f"{name}.png", png(draw()))
            except Exception as error:  # a figure is worth less than the results
                remarks.append(f"figures/{name}.png is missing: {type(error).__name__}: {error}")
    return tuple(remarks)


def _draw_trials(picture: _Picture) -> Any:
    """The value of each trial, and the best so far."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 # optional

    from lightning_flatmtl.comparison.figures.canvas import canvas  # noqa: PLC0415

    figure = canvas(7.6, 4.2)
    axes = figure.subplots()
    for method in picture.methods:
        own = [row for row in picture.rows if row["method"] == method]
        style = picture.styles[method]
        if len(picture.methods) <= _TOGETHER:
            _draw_points(axes, picture, own, [row["trial"] for row in own], style)
        numbers, values = _best_so_far(own, picture.highest)
        last = max(row["trial"] for row in picture.rows)
        if values:
            axes.plot(
                [*numbers, last], [*values, values[-1]], drawstyle="steps-post",
                color=style.colour, linestyle=style.line, linewidth=1.5, zorder=2,
            )  # fmt: skip
    picture.frame(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"trial\nLines: the best so far.{picture.words}", ylabel=picture.metric)
    _legend(figure, picture)
    return figure


def _draw_arguments(
    picture: _Picture, spaces: Mapping[str, Space], best: Mapping[str, Best]
) -> Any:
    """The value against each argument; the best trial of each method has a ring."""
    from lightning_flatmtl.comparison.figures.canvas import canvas, name_of  # noqa: PLC0415

    columns = min(len(spaces), _WIDEST)
    lines = math.ceil(len(spaces) / columns)
    figure = canvas(3.1 * columns + 2.2, 3.3 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes in grid[len(spaces) :]:
        axes.set_axis_off()
    for place, ((name, space), axes) in enumerate(zip(spaces.items(), grid, strict=False)):
        for method in picture.methods:
            own = [row for row in picture.rows if row["method"] == method and name in row]
            style = picture.styles[method]
            _draw_points(axes, picture, own, [_at(space, row[name]) for row in own], style)
            found = best.get(method)
            if found is not None and name in found.arguments:
                axes.plot(
                    _at(space, found.arguments[name]), picture.inside(found.value), "o",
                    markersize=13, markerfacecolor="none", markeredgecolor=style.colour,
                    markeredgewidth=1.3, zorder=4,
                )  # fmt: skip
        picture.frame(axes)
        _set_scale(axes, space)
        axes.set_xlabel(name_of(name))
        axes.set_ylabel(picture.metric if place % columns == 0 else "")
    _legend(figure, picture)
    words = f"A ring: the best trial of the method.{picture.words}"
    figure.supxlabel(words, fontsize="small")
    return figure


def _draw_points(
    axes: Any, picture: _Picture, rows: Sequence[Row], places: Sequence[float], style: Style
) -> None:
    """Complete trials with the method's marker, pruned ones as small crosses."""
    for row, place in zip(rows, places, strict=True):
        pruned = row["state"] == "pruned"
        axes.plot(
            place, picture.inside(row["value"]), color=style.colour, linestyle="none",
            marker="x" if pruned else style.marker, markersize=4 if pruned else 5.5,
            markerfacecolor=style.colour if style.filled else "white", alpha=0.8, zorder=3,
        )  # fmt: skip


def _set_scale(axes: Any, space: Space) -> None:
    """The whole space, also where no trial was."""
    from matplotlib.ticker import NullLocator  # noqa: PLC0415 # optional

    from lightning_flatmtl.comparison.figures.canvas import name_of  # noqa: PLC0415

    if space.choices:
        axes.set_xticks(range(len(space.choices)), [name_of(str(c)) for c in space.choices])
        axes.set_xlim(-0.5, len(space.choices) - 0.5)
        return
    low, high = float(space.low or 0), float(space.high or 0)
    if not space.log:
        margin = 0.05 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        return
    margin = (high / low) ** 0.05
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [low * (high / low) ** (i / 3) for i in range(4)]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.set_xlim(low / margin, high * margin)


def _legend(figure: Any, picture: _Picture) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 # optional

    from lightning_flatmtl.comparison.figures.canvas import (  # noqa: PLC0415
        legend_beside,
        name_of,
    )

    handles, names = [], []
    for method in picture.methods:
        style = picture.styles[method]
        filling = style.colour if style.filled else "white"
        handles.append(
            Line2D(
                [], [], color=style.colour, linestyle=style.line, marker=style.marker,
                markersize=5.5, markerfacecolor=filling,
            )
        )  # fmt: skip
        names.append(name_of(method))
    if any(row["state"] == "pruned" for row in picture.rows):
        handles.append(Line2D([], [], color="0.4", linestyle="none", marker="x", markersize=4))
        names.append("pruned, last value")
    legend_beside(figure, handles, names)


def _at(space: Space, value: Any) -> float:
    """Where a value is on the axis."""
    return float(space.choices.index(value)) if space.choices else float(value)


def _best_so_far(rows: Sequence[Row], highest: bool) -> tuple[list[int], list[float]]:
    numbers: list[int] = []
    values: list[float] = []
    for row in sorted(rows, key=lambda row: row["trial"]):
        if row["state"] == "complete":
            before = values[-1:]
            numbers.append(row["trial"])
            values.append((max if highest else min)([*before, row["value"]]))
    return numbers, values


def _limits(values: Sequence[float], highest: bool) -> tuple[float, float]:
    """The range of what is drawn; the worst may lie beyond, so that the best can be told apart."""
    whole = min(values), max(values)
    if len(values) < 5:
        return whole
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    fence = _FENCE * (third - first)
    if highest:
        return min(v for v in values if v >= first - fence), whole[1]
    return whole[0], max(v for v in values if v <= third + fence)
