"""Which figures there are, and how they are written; none of them spoils a table."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.figures.styles import Style, styles_of
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.metric_names import label
from lightning_flatmtl.comparison.summary import COST, PARAMETERS, Summary

__all__ = ["write_figures"]

Drawing = Callable[[], Any]


def write_figures(
    folder: Path,
    summary: Summary,
    methods: Sequence[str],
    curves: Mapping[str, Sequence[Path]],
) -> tuple[str, ...]:
    """Draw a comparison.

    Args:
        folder: Where the PNG files go.
        summary: The table.
        methods: All methods of the comparison, in their order.
        curves: The ``curves.csv`` of each method's runs.

    Returns:
        Why figures are missing, if some are; nothing is raised.
    """
    if not summary.figures:
        return ()
    if find_spec("matplotlib") is None:
        return ('No figures without matplotlib: run `pip install "lightning-flatmtl[plots]"`.',)
    from lightning_flatmtl.comparison.figures.canvas import neutral, png  # noqa: PLC0415 # optional

    styles = styles_of(methods)
    remarks = []
    with neutral():
        for name, draw in _drawings(summary, styles, curves):
            try:
                figure = draw()
                if figure is not None:
                    write_whole(folder / f"{name}.png", png(figure))
            except Exception as error:  # a figure is worth less than the results
                remarks.append(f"figures/{name}.png is missing: {type(error).__name__}: {error}")
    return tuple(remarks)


def _drawings(
    summary: Summary, styles: Mapping[str, Style], curves: Mapping[str, Sequence[Path]]
) -> Iterator[tuple[str, Drawing]]:
    """The name of each file and what draws it."""
    from lightning_flatmtl.comparison.figures import bars, trade_off  # noqa: PLC0415 # optional
    from lightning_flatmtl.comparison.figures.curves import draw_curves  # noqa: PLC0415

    taken: set[str] = set()
    gain = trade_off.gain_column(summary)
    if gain is not None:
        name = _file_name(f"{gain.name}_over_cost", taken)
        yield name, partial(trade_off.draw_trade_off, summary, gain, styles)
    yield _file_name("curves", taken), partial(draw_curves, curves, styles)
    for column in summary.columns:
        if column.name not in {COST, PARAMETERS}:
            name = _file_name(column.name, taken)
            yield name, partial(bars.draw_bars, summary, column, styles)


def _file_name(name: str, taken: set[str]) -> str:
    """A name for a file, different from those taken on any file system."""
    words = re.sub(r"[^\w.+-]+", "_", label(name)).strip("._")[:100] or "metric"
    free, number = words, 2
    while free.lower() in taken:
        free, number = f"{words}_{number}", number + 1
    taken.add(free.lower())
    return free
