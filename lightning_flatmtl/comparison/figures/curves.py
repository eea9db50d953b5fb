"""Training and validation loss against epoch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_flatmtl.callbacks._pictures import is_wide
from lightning_flatmtl.comparison.curves import TRAIN_LOSS, read_curves
from lightning_flatmtl.comparison.figures.canvas import canvas, legend_beside, name_of
from lightning_flatmtl.comparison.figures.styles import Style
from lightning_flatmtl.comparison.metric_names import validation_loss

__all__ = ["draw_curves"]

_TOGETHER = 6
"""More methods than this are not drawn over each other: each family has a panel."""

_WIDEST = 4
Band = tuple[list[int], list[float], list[float]]
"""Epochs, means and deviations over the seeds."""

_ROWS = ("training loss", "validation loss")
_OTHERS: dict[str, Any] = {"color": "0.82", "linewidth": 0.8}


def draw_curves(runs: Mapping[str, Sequence[Path]], styles: Mapping[str, Style]) -> Any:
    """Draw the losses of each method; ``None`` if none was logged.

    An epoch is drawn if all seeds of the method have it.

    Args:
        runs: The files of each method's runs, a run a seed.
        styles: How methods are drawn.
    """
    found = {m: _bands([read_curves(path) for path in paths]) for m, paths in runs.items()}
    bands = {method: each for method, each in found.items() if each}
    rows = [row for row in _ROWS if any(row in each for each in bands.values())]
    if not rows:
        return None
    panels = _panels(list(bands), styles)
    figure, grid = _together(rows) if len(panels) == 1 else _apart(panels, rows)
    for row, line_of_axes in zip(rows, grid, strict=True):
        own = {method: each[row] for method, each in bands.items() if row in each}
        for panel, axes in zip(panels.values(), line_of_axes, strict=True):
            _draw_panel(axes, own, panel, styles)
        _set_scale(line_of_axes, own)
    handles = [_line(styles[method]) for method in bands]
    names = [name_of(method) for method in bands]
    if len(panels) > 1:
        handles.append(Line2D([], [], **_OTHERS))
        names.append("the other methods")
    legend_beside(figure, handles, names)
    if any(len(runs[method]) > 1 for method in bands):
        figure.supxlabel("Lines: mean over seeds; bands: ± standard deviation.", fontsize="small")
    return figure


def _bands(seeds: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, Band]:
    """The bands of a method, by row."""
    validation = validation_loss(dict.fromkeys(name for seed in seeds for name in seed))
    found = {}
    for row, name in zip(_ROWS, (TRAIN_LOSS, validation), strict=True):
        series = [seed[name] for seed in seeds if name in seed] if name else []
        epochs = sorted(set.intersection(*map(set, series))) if series else []
        if epochs:
            values = [[each[epoch] for each in series] for epoch in epochs]
            found[row] = (epochs, *_mean_and_std(values))
    return found


def _mean_and_std(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """NaN, which is not drawn, where a seed has no finite value."""
    means, deviations = [], []
    for each in values:
        finite = all(map(math.isfinite, each))
        means.append(statistics.fmean(each) if finite else math.nan)
        several = statistics.stdev(each) if finite and len(each) > 1 else 0.0
        deviations.append(several if finite else math.nan)
    return means, deviations


def _panels(methods: Sequence[str], styles: Mapping[str, Style]) -> dict[str, list[str]]:
    """The methods of each panel, by its title."""
    if len(methods) <= _TOGETHER:
        return {"": list(methods)}
    found: dict[str, list[str]] = {}
    for method in methods:
        found.setdefault(styles[method].family, []).append(method)
    return found


def _together(rows: Sequence[str]) -> tuple[Any, list[list[Any]]]:
    """The losses side by side."""
    figure = canvas(3.6 * len(rows) + 1.8, 3.6)
    grid = figure.subplots(1, len(rows), squeeze=False)[0]
    for row, axes in zip(rows, grid, strict=True):
        axes.set(xlabel="epoch", ylabel=row)
    return figure, [[axes] for axes in grid]


def _apart(panels: Mapping[str, Any], rows: Sequence[str]) -> tuple[Any, list[list[Any]]]:
    """Panels beside each other, the losses of each below each other."""
    blocks = math.ceil(len(panels) / _WIDEST)
    columns = math.ceil(len(panels) / blocks)
    figure = canvas(2.3 * columns + 2.3, 0.6 + 1.95 * blocks * len(rows))
    every = figure.subplots(blocks * len(rows), columns, squeeze=False)
    grid: list[list[Any]] = [[] for _ in rows]
    for index in range(blocks * columns):
        block, column = divmod(index, columns)
        for i in range(len(rows)):
            axes = every[block * len(rows) + i][column]
            if index >= len(panels):
                axes.set_axis_off()
                continue
            grid[i].append(axes)
            axes.tick_params(labelleft=column == 0, labelbottom=i == len(rows) - 1)
            if column == 0:
                axes.set_ylabel(rows[i])
            if i == len(rows) - 1:
                axes.set_xlabel("epoch")
    for title, axes in zip(panels, grid[0], strict=True):
        axes.set_title(name_of(title), fontsize="medium")
    return figure, grid


def _draw_panel(
    axes: Any, bands: Mapping[str, Band], own: Sequence[str], styles: Mapping[str, Style]
) -> None:
    for method, (epochs, means, _) in bands.items():
        if method not in own:
            axes.plot(_ends(epochs), means, zorder=1, **_OTHERS)
    for place, method in enumerate(own):
        if method not in bands:
            continue
        epochs, means, deviations = bands[method]
        style, x = styles[method], _ends(epochs)
        every = max(1, len(x) // 5)  # a few markers, each line's elsewhere
        axes.plot(x, means, markevery=(place % every, every), zorder=3, **_look(style))
        low = [mean - std for mean, std in zip(means, deviations, strict=True)]
        high = [mean + std for mean, std in zip(means, deviations, strict=True)]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(alpha=0.25)


def _ends(epochs: Sequence[int]) -> list[int]:
    """How many epochs are done at the end of each."""
    return [epoch + 1 for epoch in epochs]


def _set_scale(line_of_axes: Sequence[Any], bands: Mapping[str, Band]) -> None:
    """The same scale in all panels, logarithmic where a loss falls steeply."""
    values = [mean for _, means, _ in bands.values() for mean in means if math.isfinite(mean)]
    epochs = [epoch for each, _, _ in bands.values() for epoch in _ends(each)]
    if not values:
        return
    low, high, steep = min(values), max(values), is_wide(values)
    margin = 0.06 * (high - low) or 0.5
    for axes in line_of_axes:
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        if steep:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.3, high * 1.3)
        else:
            axes.set_ylim(low - margin, high + margin)


def _look(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 1.4,
        "marker": style.marker,
        "markersize": 4.5,
        "markerfacecolor": style.colour if style.filled else "white",
    }


def _line(style: Style) -> Line2D:
    return Line2D([], [], **_look(style))
