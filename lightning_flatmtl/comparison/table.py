"""The table of a comparison, in Markdown and in LaTeX."""

import math
from collections.abc import Callable, Sequence

from lightning_flatmtl.comparison.metric_names import is_loss
from lightning_flatmtl.comparison.settings import SINGLE_TASK
from lightning_flatmtl.comparison.summary import (
    COST,
    DELTA_M,
    PARAMETERS,
    Column,
    Figure,
    Summary,
)

__all__ = ["latex", "markdown", "shown_columns"]

_WIDEST = 14
"""More columns than this are not read."""


def shown_columns(summary: Summary) -> list[Column]:
    """The columns that fit into a table, Delta_m and cost among them."""
    columns = list(summary.columns)
    if len(columns) > _WIDEST:
        columns = [column for column in columns if not is_loss(column.name)] or columns
    if len(columns) > _WIDEST:  # the averages stand for them, those of losses too
        columns = [column for column in summary.columns if column.average is None]
    if len(columns) > _WIDEST:
        columns = [column for column in columns if not is_loss(column.name)]
    return columns


def markdown(summary: Summary) -> str:
    """The table in Markdown: best in bold, what is within one standard error of it underlined."""
    columns = shown_columns(summary)
    heads = ["method", *(f"{column.heading}{_arrow(column)}" for column in columns)]
    lines = [_row(heads), _row(["---", *["---:"] * len(columns)])]
    for method in summary.figures:
        marked = _marker(summary, method, "**{}**".format, "<u>{}</u>".format)
        lines.append(
            _row([method, *(marked(c, _cell(summary, method, c, " ± ")) for c in columns)])
        )
    return "\n".join([*lines, "", *_words(summary, columns)]) + "\n"


def latex(summary: Summary) -> str:
    r"""The table in LaTeX, for ``\usepackage{booktabs}``."""
    columns = shown_columns(summary)
    heads = ["method", *(_escaped(c.heading) + _latex_arrow(c) for c in columns)]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    for method in summary.figures:
        marked = _marker(summary, method, r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
        cells = [marked(c, _cell(summary, method, c, r" $\pm$ ", "--")) for c in columns]
        lines.append(" & ".join([_escaped(method), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


Mark = Callable[[str], str]


def _marker(summary: Summary, method: str, best: Mark, close: Mark) -> Callable[[Column, str], str]:
    def marked(column: Column, text: str) -> str:
        if method in summary.best(column):
            return best(text)
        return close(text) if method in summary.close(column) else text

    return marked


def _cell(summary: Summary, method: str, column: Column, between: str, nothing: str = "") -> str:
    figure = summary.figures[method].get(column.name)
    if figure is None or (method == SINGLE_TASK and column.name == DELTA_M):
        return "0" if method == SINGLE_TASK and column.name == DELTA_M else nothing
    text = shown(figure.mean, column, summary)
    if figure.std is not None and column.name not in {COST, PARAMETERS}:
        text += between + shown(figure.std, column, summary)
    return text


def shown(value: float, column: Column, summary: Summary) -> str:
    """A value with as many digits as the column needs."""
    value *= column.scale
    if not math.isfinite(value):
        return str(value)
    if column.name == PARAMETERS:
        return f"{value:,.0f}"
    return f"{value:.{_digits(column, summary)}f}"


def _digits(column: Column, summary: Summary) -> int:
    if column.unit == "%" or column.name == COST:
        return 2
    means = [f[column.name].mean for f in summary.figures.values() if column.name in f]
    largest = max((abs(mean) for mean in means if math.isfinite(mean)), default=1.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 3


def _words(summary: Summary, columns: Sequence[Column]) -> list[str]:
    """What the numbers are, what flatness adds, and what has failed."""
    several = any(
        f.std is not None for by_name in summary.figures.values() for f in by_name.values()
    )
    seeds = {s for by in summary.figures.values() for f in by.values() for s in f.by_seed}
    after = ", after ± the standard deviation over the seeds" if several else ""
    listed = ", ".join(map(str, sorted(seeds)))
    lines = ["No run is done."]
    if seeds:
        of = f"Means over {len(seeds)} seeds" if len(seeds) > 1 else "One seed"
        lines = [f"{of} ({listed}){after}."]
    close = " Best mean in bold, what is within one standard error of it underlined."
    lines[0] += (close if several else " Best in bold.") if seeds else ""
    lines += ["", *(f"- {said}" for said in _gains(summary, columns))] if summary.gains else []
    lines += ["", *(f"- {note}" for note in summary.notes)] if summary.notes else []
    if summary.failures:
        lines += ["", "Failed:", "", *(f"- {_failed(row)}" for row in summary.failures)]
    if summary.missing:
        left = ", ".join(f"{method} ({n})" for method, n in summary.missing.items())
        lines += ["", f"Not done yet: {left}."]
    return lines


def _gains(summary: Summary, columns: Sequence[Column]) -> list[str]:
    said = []
    for pair, figures in summary.gains.items():
        parts = []
        for column in columns:
            overall = column.name.startswith("average/") or column.name == DELTA_M
            if overall and column.name in figures:
                parts.append(f"{column.title} {_gain(figures[column.name], column)}")
        if parts:
            said.append(f"{pair}: {', '.join(parts)}")
    several = any(
        f.error is not None for by_name in summary.gains.values() for f in by_name.values()
    )
    if said and several:
        said[-1] += "  \n  (after ± the standard error of the differences, seed by seed)"
    return said


def _gain(figure: Figure, column: Column) -> str:
    digits = 2 if column.unit == "%" else 4
    text = f"{figure.mean * column.scale:+.{digits}f}"
    if figure.error is not None:
        text += f" ± {figure.error * column.scale:.{digits}f}"
    return f"{text} points" if column.unit == "%" else text


def _failed(row: dict[str, object]) -> str:
    task = f" {row['task']}" if row["task"] else ""
    return f"{row['method']}{task}, seed {row['seed']}: {row['error']}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _arrow(column: Column) -> str:
    return {True: " ↑", False: " ↓", None: ""}[column.higher_is_better]


def _latex_arrow(column: Column) -> str:
    return {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}[column.higher_is_better]


def _escaped(text: str) -> str:
    for char in "&%$#_{}":
        text = text.replace(char, f"\\{char}")
    return text.replace("Delta\\_m", r"$\Delta_m$")
