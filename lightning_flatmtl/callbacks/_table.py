"""A CSV file with columns of its own, for figures that are more than a name and a value."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["Table"]


class Table:
    """A CSV file that grows.

    Args:
        path: The file; folders that lack are made.
        columns: Its columns.
        keep: Which rows of a file that is there stay, each by column; one with other columns is
            begun anew.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], keep: Callable[[dict[str, str]], bool]
    ) -> None:
        self._path = path
        kept: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames == list(columns):
                    whole = (row for row in reader if None not in row and None not in row.values())
                    kept = [row for row in whole if keep(row)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(kept)

    def add(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
