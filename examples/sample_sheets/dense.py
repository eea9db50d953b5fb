"""Sample sheets of dense prediction: image, classes, depth, normals in colours and as arrows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch.nn.functional import max_pool2d, pad
from torchvision.transforms import v2

from lightning_flatmtl.data import Cityscapes, NYUv2, RandomScaleCrop

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke

AUGMENTED: dict[str, Any] = {
    "as on disk": None,
    "flipped": v2.RandomHorizontalFlip(p=1),
    "scaled by 1.5": RandomScaleCrop([1.5]),
}


def draw(
    out: Path, title: str, data: NYUv2 | Cityscapes, index: int, classes: Sequence[str]
) -> None:
    """Draw a training image as it is, flipped, and scaled, a row each, and write a PNG.

    Args:
        out: Where the PNG goes.
        title: Stands above all.
        data: The module; it is set up without augmentation here.
        index: Which training image.
        classes: Names of the classes.
    """
    torch.manual_seed(0)
    data.augment = False
    data.setup()
    rows = []
    for name, data.transform in AUGMENTED.items():
        rows.append((name, *data.dataset("train")[index]))
    columns = 5 if "normals" in rows[0][2] else 3
    height, width = rows[0][1].shape[1:]
    size = (2.9 * columns, len(rows) * (2.9 * height / width + 0.2) + 0.4)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=9)
    farthest = float(rows[0][2]["depth"].max())
    for of_row, (name, image, targets) in zip(axes, rows, strict=True):
        show_image(of_row[0], name, image)
        show_classes(of_row[1], targets["segmentation"].numpy(), classes)
        show_depth(of_row[2], targets["depth"][0].numpy(), farthest)
        if "normals" in targets:
            show_normals(of_row[3], of_row[4], targets["normals"].numpy(), image)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def show_image(axis: Any, name: str, image: torch.Tensor) -> None:
    """The image."""
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1))
    axis.set_title(f"image, {name}", fontsize=7)


def show_classes(axis: Any, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Classes in colours, each with its name in the midst of its pixels; none is white."""
    axis.imshow(np.where(labels < 0, np.nan, labels), cmap="tab20", vmin=0, vmax=19,
                interpolation="nearest")  # fmt: skip
    for label in np.unique(labels[labels >= 0]):
        row, column = midst(labels == label)
        axis.text(column, row, f"{label} {classes[label]}", fontsize=5, ha="center", va="center")
    axis.set_title("segmentation (white: no label)", fontsize=7)


def midst(pixels: np.ndarray) -> tuple[int, int]:
    """The pixel that is farthest from those of others: what is left when borders are peeled off."""
    left = torch.from_numpy(pixels).float()[None]
    while left.any():
        row, column = left[0].nonzero()[0].tolist()
        left = 1 - max_pool2d(1 - pad(left, [1, 1, 1, 1]), 3, stride=1)
    return row, column


def show_depth(axis: Any, depth: np.ndarray, farthest: float) -> None:
    """Depth in colours of one scale, with figures at some places; none is white."""
    axis.imshow(np.where(depth == 0, np.nan, depth), cmap="viridis", vmin=0, vmax=farthest,
                interpolation="nearest")  # fmt: skip
    height, width = depth.shape
    for row in (height // 6, height // 2, 5 * height // 6):
        for column in (width // 8, width // 2, 7 * width // 8):
            axis.text(
                column,
                row,
                f"{depth[row, column]:.2g}",
                fontsize=7,
                ha="center",
                color="white",
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )
    axis.set_title("depth (white: no label)", fontsize=7)


def show_normals(coloured: Any, arrows: Any, normals: np.ndarray, image: torch.Tensor) -> None:
    """Normals as colours (red: x, green: y, blue: z) and, every 24 pixels, as arrows of x and y."""
    none = (normals == 0).all(0)
    coloured.imshow(np.where(none[..., None], 1, np.moveaxis(normals, 0, -1) / 2 + 0.5))
    coloured.set_title("normals (white: no label)", fontsize=7)
    arrows.imshow(image.mean(0), cmap="gray", vmin=-1, vmax=1)
    rows, columns = np.mgrid[12 : none.shape[0] : 24, 12 : none.shape[1] : 24]
    x, y, _ = normals[:, rows, columns]
    flat = np.hypot(x, y) < 0.05
    # y goes up in space and down in the picture.
    arrows.quiver(columns, rows, x, -y, angles="xy", scale_units="xy", scale=1 / 22, width=0.005,
                  color="red")  # fmt: skip
    arrows.scatter(columns[flat & ~none[rows, columns]], rows[flat & ~none[rows, columns]], s=2,
                   color="blue")  # fmt: skip
    arrows.set_title("x and y of the normals (dot: towards the camera)", fontsize=7)
