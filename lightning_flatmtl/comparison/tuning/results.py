"""The trials of a search: a row a trial, and the best of each method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.rows import Row, Rows
from lightning_flatmtl.comparison.tuning.study import MethodStudy
from lightning_flatmtl.comparison.tuning.trial import ERROR, SECONDS

__all__ = ["Best", "Trials", "best_of", "rows_of", "table_of"]

_FIRST, _LAST = ("method", "trial", "state", "value"), ("seconds", "error")
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


@dataclass(frozen=True)
class Best:
    """The best trial of a method.

    Args:
        trial: Its number.
        value: Its value.
        arguments: Its arguments, by dotted name.
    """

    trial: int
    value: float
    arguments: dict[str, Any]


class Trials(Rows):
    """A table of trials; each row is a mapping.

    ============ ====================================================================
    column       what it is
    ============ ====================================================================
    ``method``   the name in the file
    ``trial``    its number in the method's study
    ``state``    ``complete``, ``pruned``, ``failed`` or ``running`` (also: broken off)
    ``value``    the metric; of a pruned trial, the last one it reported
    *arguments*  the value of each searched argument, under its dotted name
    ``seconds``  wall-clock time
    ``error``    why it has failed
    ============ ====================================================================

    Args:
        rows: The rows.
        best: The best trial of each method.
        markdown: A table of the best trials.
        compare: The file of the comparison with the best settings; ``None`` without a best trial.
        remarks: What else is to be said.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        best: Mapping[str, Best],
        markdown: str = "",
        compare: Path | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, markdown, remarks)
        self.best = dict(best)
        self.compare = compare

    def __repr__(self) -> str:
        complete = sum(row["state"] == "complete" for row in self)
        return f"Trials({len(self)} trials, {complete} complete)"

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        fixed = {*_FIRST, *_LAST}
        arguments = dict.fromkeys(name for row in self for name in row if name not in fixed)
        return [*_FIRST, *arguments, *_LAST]


def rows_of(studies: Sequence[MethodStudy]) -> list[Row]:
    """A row for each trial that was begun."""
    return [
        _row(study.method.name, trial)
        for study in studies
        for trial in study.trials
        if trial.state.name in _STATES
    ]


def best_of(study: MethodStudy) -> Best | None:
    """The best trial; ``None`` if none is complete."""
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        return None
    highest = study.study.direction.name == "MAXIMIZE"
    best = (max if highest else min)(complete, key=lambda trial: trial.value)
    return Best(best.number, best.value, dict(best.params))


def table_of(
    metric: str, direction: str, rows: Sequence[Row], best: Mapping[str, Best | None]
) -> str:
    """The best trial of each method, in Markdown."""
    arguments = dict.fromkeys(n for each in best.values() if each for n in each.arguments)
    arrow = "↑" if direction == "maximize" else "↓"
    heads = [
        "method",
        f"{metric} {arrow}",
        *arguments,
        "best trial",
        "complete",
        "pruned",
        "failed",
    ]
    lines = [heads, ["---"] * len(heads)]
    for method, found in best.items():
        cells = [method, _text(found.value) if found else ""]
        cells += [_text(found.arguments.get(name)) if found else "" for name in arguments]
        states = [row["state"] for row in rows if row["method"] == method]
        counts = [str(states.count(state)) for state in ("complete", "pruned", "failed")]
        lines.append([*cells, str(found.trial) if found else "", *counts])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(method: str, trial: Any) -> Row:
    value = trial.value
    return {
        "method": method,
        "trial": trial.number,
        "state": _STATES[trial.state.name],
        "value": None if value is None or math.isnan(value) else value,
        **trial.params,
        "seconds": trial.user_attrs.get(SECONDS),
        "error": trial.user_attrs.get(ERROR, ""),
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
