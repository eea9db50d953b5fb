"""The sample sheet of NYUv2.

python examples/sample_sheets/nyuv2.py --root data/nyuv2 --out docs/images/nyuv2_samples.png

Without the folder, a room is drawn, written in the format of the pack, and read from there.
"""

from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

from dense import draw
from scenes import Ball, Box, render, write

from lightning_flatmtl.data import NYUv2

CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table",
    "TV", "wall", "window",
)  # fmt: skip

WALL, WOOD = (0.85, 0.8, 0.7), (0.7, 0.5, 0.3)
ROOM = (
    Box((-2.2, -1.3, -9), (-2, 1.5, 1), 11, WALL),
    Box((2.4, -1.3, -9), (2.6, 1.5, 1), 11, (0.6, 0.75, 0.85)),
    Box((-2.2, -1.3, -5.4), (2.6, 1.5, -5.2), 11, WALL),
    Box((-3, -1.4, -9), (3, -1.2, 1), 4, (0.6, 0.6, 0.6), tiles=True),
    Box((-3, 1.3, -9), (3, 1.5, 1), 2, (0.95, 0.95, 0.95)),
    Box((-2, -0.1, -3.6), (-1.97, 0.8, -2.3), 7, (0.8, 0.2, 0.2)),  # on the left wall
    Box((0.6, -0.2, -5.2), (1.9, 0.9, -5.17), 12, (0.5, 0.8, 1.0), seen=False),  # glass
    Box((0.5, -0.55, -4), (1.9, -0.45, -3), 9, WOOD),
    Box((0.55, -1.2, -3.2), (0.65, -0.55, -3.1), 9, WOOD),
    Box((1.75, -1.2, -3.2), (1.85, -0.55, -3.1), 9, WOOD),
    Ball((-0.9, -0.7, -3.2), 0.5, 6, (0.3, 0.7, 0.3)),
)
NAMES = {"image": "image", "labels": "label", "depth": "depth", "normals": "normal"}
FRAME = 6  # pixels at the border without a label, as in the real images


def main() -> None:
    """Draw the sheet."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data/nyuv2")
    parser.add_argument("--out", type=Path, default=Path("docs/images/nyuv2_samples.png"))
    parser.add_argument("--index", type=int, default=0)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        root, index, title = given.root, given.index, f"NYUv2, training image {given.index}"
        if not Path(root).is_dir():
            scene = render(ROOM, (288, 384))
            for values, none in (("labels", -1), ("depth", 0), ("normals", 0)):
                inside = scene[values][FRAME:-FRAME, FRAME:-FRAME].copy()
                scene[values][:] = none
                scene[values][FRAME:-FRAME, FRAME:-FRAME] = inside
            root, index = str(write(Path(folder) / "nyuv2", scene, NAMES)), 0
            title = "Not NYUv2: a drawn room in its format and size, read by the data module"
        draw(given.out, title, NYUv2(root, val_fraction=0, batch_size=1), index, CLASSES)


if __name__ == "__main__":
    main()
