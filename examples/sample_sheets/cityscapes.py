"""The sample sheet of Cityscapes.

python examples/sample_sheets/cityscapes.py --root data/cityscapes \
    --out docs/images/cityscapes_samples.png

Without the folder, a street is drawn, written in the format of the pack, and read from there.
"""

from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from dense import draw
from scenes import Ball, Box, render, write

from lightning_flatmtl.data import Cityscapes

CLASSES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")

STREET = (
    Box((-900, -400, -1000), (900, 900, -999), 4, (0.9, 1.4, 1.8), seen=False),
    Box((-90, -1.7, -900), (90, -1.5, 1), 0, (0.5, 0.5, 0.55), tiles=True),
    Box((-12, -1.5, -90), (-6, 8, -9), 1, (0.8, 0.55, 0.45)),
    Box((7, -1.5, -60), (14, 4.5, -7), 1, (0.75, 0.7, 0.6)),
    Box((1.2, -1.5, -14), (3.4, 0.2, -10), 6, (0.9, 0.2, 0.2)),
    Box((-3.0, -1.5, -8.4), (-2.5, 0.3, -8), 5, (0.3, 0.4, 1.0)),
    Box((4.6, -1.5, -9.1), (4.75, 2, -9), 2, (0.6, 0.6, 0.6)),
    Box((4.3, 1.2, -9.05), (5.05, 2, -8.95), 2, (1.0, 0.9, 0.2)),
    Box((-4.9, -1.5, -12.2), (-4.6, 1, -12), 3, (0.5, 0.35, 0.2)),
    Ball((-4.75, 2, -12), 1.4, 3, (0.3, 0.7, 0.3)),
)
NAMES = {"image": "image", "labels": "label_7", "depth": "depth"}
BONNET = 8  # rows of the camera's own car, which has no label


def main() -> None:
    """Draw the sheet."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data/cityscapes")
    parser.add_argument("--out", type=Path, default=Path("docs/images/cityscapes_samples.png"))
    parser.add_argument("--index", type=int, default=0)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        root, index, title = given.root, given.index, f"Cityscapes, training image {given.index}"
        if not Path(root).is_dir():
            scene = render(STREET, (128, 256))
            depth = scene["depth"]
            scene["depth"] = np.divide(1, depth, out=np.zeros_like(depth), where=depth > 0)
            scene["labels"][-BONNET:], scene["depth"][-BONNET:] = -1, 0
            root, index = str(write(Path(folder) / "cityscapes", scene, NAMES)), 0
            title = "Not Cityscapes: a drawn street in its format and size (inverse depth)"
        draw(given.out, title, Cityscapes(root, val_fraction=0, batch_size=1), index, CLASSES)


if __name__ == "__main__":
    main()
