"""The picture of GradientConflict: rates and cosines by epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS

__all__ = ["draw_conflict"]

_SERIES = {
    "conflict": "loss parts",
    "conflict/flat": "flat parts",
    "conflict/between": "loss with flat parts",
}


def draw_conflict(epochs: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the means of epochs.

    Args:
        epochs: For every epoch its number as ``epoch``, and for every series ``rate``,
            ``mean_cosine``, ``least_cosine`` and ``greatest_cosine`` behind its name.
        path: The file, PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    # Without pyplot: no window, and the user's own figures stay as they are.
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    rates, cosines = figure.subplots(1, 2)
    several = False
    for (series, label), colour, marker in zip(_SERIES.items(), COLOURS, MARKERS, strict=False):
        style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "label": label}
        at = [e for e in epochs if f"{series}/rate" in e]
        if at:
            x = [e["epoch"] for e in at]
            rates.plot(x, [100 * e[f"{series}/rate"] for e in at], **style)
        at = [e for e in at if f"{series}/mean_cosine" in e]
        if at:
            x = [e["epoch"] for e in at]
            low = [e[f"{series}/least_cosine"] for e in at]
            high = [e[f"{series}/greatest_cosine"] for e in at]
            cosines.plot(x, [e[f"{series}/mean_cosine"] for e in at], **style)
            if low != high:
                several = True
                cosines.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    rates.set(title="Conflicts", xlabel="epoch", ylabel="pairs that conflict [%]", ylim=(-3, 103))
    band = " (band: all pairs)" if several else ""
    cosines.set(title=f"Cosines{band}", xlabel="epoch", ylabel="mean cosine of pairs")
    cosines.axhline(0.0, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    for axes in (rates, cosines):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
    handles, labels = rates.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    elif handles:
        figure.suptitle(f"Gradients of the tasks: {labels[0]}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
