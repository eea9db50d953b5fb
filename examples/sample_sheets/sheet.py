"""Sample sheets: what a data module yields, drawn with labels, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

Picture = tuple[np.ndarray, str]


def draw(out: Path, title: str, rows: Sequence[Sequence[Picture]], inches: float = 1.4) -> None:
    """Draw rows of pictures, each ``(array, caption)``, and write a PNG.

    Args:
        out: Where the PNG goes.
        title: Stands above all.
        rows: Arrays ``[height, width]`` (grey) or ``[height, width, 3]`` with values in [0, 1].
        inches: Height of a row.
    """
    columns = max(map(len, rows))
    height, width = rows[0][0][0].shape[:2]
    size = (columns * inches * width / height, len(rows) * (inches + 0.35) + 0.5)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    for of_row, pictures in zip(axes, rows, strict=True):
        for axis, (array, caption) in zip(of_row, pictures, strict=False):
            axis.imshow(array, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(caption, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
