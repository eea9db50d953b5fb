"""What a run has logged at the end of each epoch."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.files import write_whole

__all__ = ["TRAIN_LOSS", "Curves", "read_curves"]

TRAIN_LOSS = "train/loss/mean"
"""The mean over the epoch's batches of the loss that ``training_step`` returns."""

_COLUMNS = ("epoch", "step", "name", "value")


class Curves:
    """Rows ``epoch, step, name, value``; they are saved with the run and resume with it."""

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def add(self, epoch: int, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of an epoch."""
        self._rows.extend([epoch, step, name, value] for name, value in figures.items())

    def write(self, path: Path) -> None:
        """Write all rows."""
        text = io.StringIO()
        csv.writer(text).writerows([_COLUMNS, *self._rows])
        write_whole(path, text.getvalue())

    def state_dict(self) -> list[list[Any]]:
        """What a checkpoint keeps."""
        return [list(row) for row in self._rows]

    def load_state_dict(self, rows: list[list[Any]]) -> None:
        """Go on from there."""
        self._rows = [list(row) for row in rows]


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Values by name and epoch; empty if there is no such file."""
    found: dict[str, dict[int, float]] = {}
    if not path.is_file():
        return found
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], {})[int(row["epoch"])] = float(row["value"])
    return found
