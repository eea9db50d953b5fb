"""A table of rich that is drawn anew while runs or trials go on, and the cells of progress."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Self

__all__ = ["LiveDrawing", "escaped", "is_live", "progress_cells"]


class LiveDrawing:
    """What is drawn at most twice a second, in place, and gone at the end."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 # optional
        from rich.live import Live  # noqa: PLC0415

        # Rich's common console knows what the terminal was when it was made.
        self._live = Live(console=Console(), refresh_per_second=4, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(*error)  # type: ignore[arg-type]

    @property
    def height(self) -> int:
        """The lines of the terminal."""
        return int(self._live.console.height)

    def print(self, text: str) -> None:
        """Print a line above the drawing."""
        self._live.console.print(text, markup=False, highlight=False)

    def draw(self, make: Callable[[], Any], *, hurry: bool) -> None:
        """Draw what ``make`` returns; ``hurry`` if it is not to be left out."""
        if time.monotonic() - self._drawn < 0.5 and not hurry:
            return
        self._drawn = time.monotonic()
        self._live.update(make(), refresh=True)


def is_live() -> bool:
    """Whether there is a terminal, and rich."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def escaped(cells: Iterable[str]) -> tuple[str, ...]:
    r"""Cells of a table of rich as they are: an error's brackets are no markup.

    Example:
        >>> escaped(["layers.0 [3, 4]"])
        ('layers.0 \\[3, 4]',)
    """
    return tuple(cell.replace("[", r"\[") for cell in cells)


def progress_cells(progress: Mapping[str, Any]) -> tuple[str, str]:
    """The epoch of a run and its latest validation value.

    Example:
        >>> progress_cells({"epoch": 3, "epochs": 15, "monitor": "val/loss", "value": 0.25})
        ('3/15', 'val/loss 0.25')
        >>> progress_cells({})
        ('', '')
    """
    epoch = f"{progress['epoch']}/{progress['epochs']}" if progress else ""
    value = progress.get("value")
    return epoch, "" if value is None else f"{progress['monitor']} {value:.4g}"
