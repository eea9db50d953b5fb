"""What the pictures of the diagnostics have in common. Matplotlib is optional."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

__all__ = ["COLOURS", "MARKERS", "checked_path", "is_wide", "need_matplotlib"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Those of Okabe and Ito, which all kinds of colour vision tell apart."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""Beside the colours, for print in black and white."""


_WIDE = 50.0


def is_wide(values: Sequence[float]) -> bool:
    """Whether values, all positive, are so far apart that a logarithmic scale is to show them."""
    finite = [value for value in values if isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > _WIDE


def need_matplotlib() -> None:
    """Refuse a picture that cannot be drawn, before anything is trained.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            'matplotlib is not installed: run `pip install "lightning-flatmtl[plots]"`.'
        )


def checked_path(name: str, path: str | Path | None, suffix: str) -> Path | None:
    """The path of a file to write.

    Raises:
        ValueError: If it does not end in ``suffix``.
    """
    if path is None:
        return None
    if not isinstance(path, str | Path) or Path(path).suffix.lower() != suffix:
        raise ValueError(f"`{name}` must be the path of a {suffix} file, got {path!r}.")
    return Path(path)
