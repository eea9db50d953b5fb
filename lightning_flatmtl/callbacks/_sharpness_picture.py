"""The picture of SharpnessMonitor: the rise of every task's loss, and its curvature, by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS

__all__ = ["draw_sharpness"]

_RISE = r"$L_i(\theta + \epsilon_i) - L_i(\theta)$ [units of the loss]"
_PANELS = {
    "": ("Sharpness", _RISE),
    "/head": ("Sharpness of the heads alone", _RISE),
    "/top_eigenvalue": (
        "Largest eigenvalue of the Hessian",
        r"$\lambda_{\max}(\nabla^2 L_i)$ [loss / parameter$^2$]",
    ),
}
_LINES = ("-", "--", ":", "-.")
"""For more tasks than there are colours."""


def draw_sharpness(means: Sequence[Mapping[str, float]], path: Path, batches: str) -> None:
    """Draw means against the optimizer steps done.

    Args:
        means: For every time its ``step``, and figures by their names in the log.
        path: The file, PNG.
        batches: What batches they are of, in a word.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    series = _series(means)
    shown = [end for end in _PANELS if any(kind == end for _, kind in series)]
    tasks = list(dict.fromkeys(task for task, _ in series))
    # Without pyplot: no window, and the user's own figures stay as they are.
    figure = Figure(figsize=(1.0 + 4.3 * len(shown), 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, end in zip(panels, shown, strict=True):
        for i, task in enumerate(tasks):
            name = (task, end)
            at = [(m["step"], m[series[name]]) for m in means if series.get(name) in m]
            if at:
                steps, values = zip(*at, strict=True)
                panel.plot(steps, values, label=task, ms=4, **_style(i))
        title, unit = _PANELS[end]
        panel.set(title=title, xlabel="optimizer steps", ylabel=unit)
        panel.axhline(0.0, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.ticklabel_format(axis="y", scilimits=(-2, 4))
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    of_label = 0.7 + 0.09 * max(map(len, labels))  # inches
    columns = max(1, int(figure.get_figwidth() / of_label))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"Means over {batches} batches", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _style(i: int) -> dict[str, Any]:
    """That of the i-th task, another for each of two dozen."""
    turn, place = divmod(i, len(COLOURS))
    marker = MARKERS[(place + turn) % len(MARKERS)]
    line = _LINES[turn % len(_LINES)]
    return {"color": COLOURS[place], "marker": marker, "linestyle": line}


def _series(means: Sequence[Mapping[str, float]]) -> dict[tuple[str, str], str]:
    """Task and kind of every figure, and the name of it."""
    found = {}
    for name in dict.fromkeys(name for m in means for name in m if name != "step"):
        label, loader = name.removeprefix("sharpness/"), ""
        if "/dataloader_idx_" in label:
            label, _, loader = label.rpartition("/dataloader_idx_")
        end = next((end for end in reversed(_PANELS) if end and label.endswith(end)), "")
        task = label.removesuffix(end) if end else label
        found[f"{task} ({loader})" if loader else task, end] = name
    return found
