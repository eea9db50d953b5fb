"""What the figures of a comparison have in common. Imports matplotlib."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = ["canvas", "legend_beside", "name_of", "neutral", "pale", "png"]

_LONGEST = 34


@contextmanager
def neutral() -> Iterator[None]:
    """Draw as matplotlib does by default, whatever the user has set for own figures."""
    with matplotlib.style.context("default"), warnings.catch_warnings():
        # A name in a script that the font does not have: boxes are enough of a message.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def canvas(width: float, height: float) -> Any:
    """An empty figure of a size in inches.

    Without pyplot: no window, and the user's own figures stay as they are.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def pale(colour: str) -> tuple[float, ...]:
    """A colour mixed with white."""
    return tuple(0.35 * part + 0.65 for part in to_rgb(colour))


def name_of(method: str) -> str:
    """A name that fits beside an axis and is no formula."""
    if len(method) > _LONGEST:
        half = _LONGEST // 2
        method = f"{method[:half]}…{method[-half:]}"
    if method.startswith("_"):
        method = f" {method}"  # a legend leaves out what begins with an underscore
    return method.replace("$", r"\$")


def legend_beside(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend at the right of all axes; names as ``name_of`` gives them."""
    figure.legend(
        handles,
        list(names),
        loc="outside right upper",
        ncols=1 + (len(names) - 1) // 30,
        frameon=False,
        fontsize="small",
        handlelength=3.4,
    )
