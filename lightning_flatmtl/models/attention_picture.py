"""A picture of which task looks at which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["attention_picture"]


def attention_picture(weights: Tensor, tasks: Sequence[str], path: str | Path) -> Tensor:
    """Draw the mean attention between tasks as a map, the tasks that look down, the others across.

    Args:
        weights: What :meth:`TaskAttention.attention_weights` returns, ``[..., tasks, tasks]``.
        tasks: Names of the tasks, in that order.
        path: The file, PNG.

    Returns:
        The means that are drawn, ``[tasks, tasks]``.

    Raises:
        ValueError: If the weights do not fit the tasks, or the path does not end in ``.png``.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MLPEncoder, TaskAttention, attention_picture
        >>> encoder = TaskAttention(["a", "b"], MLPEncoder(8), lambda: MLPEncoder(64), 64)
        >>> weights = encoder.attention_weights(torch.zeros(5, 8))
        >>> attention_picture(weights, encoder.tasks, "attention.png").shape  # doctest: +SKIP
        torch.Size([2, 2])
    """
    m = len(tasks)
    if weights.ndim < 2 or tuple(weights.shape[-2:]) != (m, m):
        raise ValueError(f"`weights` must be [..., {m}, {m}], got {list(weights.shape)}.")
    # Here, since a model needs no callbacks.
    from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib  # noqa: PLC0415

    need_matplotlib()
    file = checked_path("path", path, ".png")
    means = weights.detach().to(torch.float64).reshape(-1, m, m).mean(0).cpu()
    assert file is not None
    _draw(means, list(tasks), file)
    return means


def _draw(means: Tensor, tasks: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 # optional
    from matplotlib.figure import Figure  # noqa: PLC0415

    side = 2.2 + 0.7 * len(tasks)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(means.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="looked at", ylabel="looks")
    for row, values in enumerate(means.tolist()):
        for column, value in enumerate(values):
            colour = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="mean weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
