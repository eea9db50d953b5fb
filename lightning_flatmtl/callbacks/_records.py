"""Figures in a CSV file, a row each: it grows while training goes on, and resumes with it."""

import csv
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Records"]

_COLUMNS = ["epoch", "step", "name", "value"]


class Records:
    """A CSV file with the columns ``epoch, step, name, value``.

    Args:
        path: The file; folders that lack are made.
        step: Rows of later steps than this are those of a run that was broken off; they go.
            ``None`` begins the file anew.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self._path = path
        kept: list[list[str]] = []
        if step is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS)]
            kept = [row for row in rows if row != _COLUMNS and int(row[1]) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])

    def add(self, epoch: int, step: int, figures: Mapping[str, float]) -> None:
        """Append a row for every figure."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([epoch, step, name, v] for name, v in figures.items())
