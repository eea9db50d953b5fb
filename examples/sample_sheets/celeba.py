"""CelebA: images as a network gets them, with some of their labels.

    python examples/sample_sheets/celeba.py --root data --out docs/images/celeba_samples.png

Without --root faces are drawn, in files of the true format: what a caption says can be seen, and
the letter L stands on the left of every one.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw
from sheet import Picture, draw

from lightning_flatmtl.data import CelebA

SHOWN = ("Smiling", "Eyeglasses", "Wearing_Hat", "Mustache", "Blond_Hair")
COLUMNS = 7


def drawn(shown: dict[str, bool], tone: int) -> torch.Tensor:
    """A face with these attributes, uint8 ``[3, 218, 178]``."""
    image = Image.new("RGB", (178, 218), (110, 140 + 8 * tone, 170))
    pen = ImageDraw.Draw(image)
    hair = (235, 205, 100) if shown["Blond_Hair"] else (50, 35, 25)
    pen.ellipse((35, 35, 143, 165), fill=hair)
    pen.ellipse((47, 58, 131, 178), fill=(225, 185 - 10 * tone, 160 - 12 * tone))
    for x in (70, 108):
        pen.ellipse((x - 6, 105, x + 6, 113), fill="white", outline="black")
        pen.ellipse((x - 3, 106, x + 3, 112), fill="black")
        if shown["Eyeglasses"]:
            pen.ellipse((x - 15, 95, x + 15, 123), outline="black", width=4)
    if shown["Eyeglasses"]:
        pen.line((85, 108, 93, 108), fill="black", width=4)
    if shown["Mustache"]:
        pen.rectangle((70, 136, 108, 143), fill=hair)
    if shown["Smiling"]:
        pen.arc((66, 128, 112, 164), 20, 160, fill=(160, 30, 40), width=5)
    else:
        pen.line((72, 156, 106, 156), fill=(160, 30, 40), width=5)
    if shown["Wearing_Hat"]:
        pen.rectangle((25, 62, 153, 72), fill=(140, 30, 120))
        pen.rectangle((52, 18, 126, 66), fill=(140, 30, 120))
    pen.line((8, 80, 8, 130), fill="white", width=7)
    pen.line((5, 130, 28, 130), fill="white", width=7)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_drawn(root: Path) -> Path:
    """Faces that look as their labels say, in files of the true format."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.data.writers.celeba import labels, write_celeba  # noqa: PLC0415 - of the repository

    splits = (COLUMNS, COLUMNS, COLUMNS)
    columns = [CelebA.ATTRIBUTES.index(name) for name in SHOWN]

    def picture(row: int, seed: int) -> torch.Tensor:
        of_row = labels(sum(splits), seed)[row, columns] == 1
        return drawn(dict(zip(SHOWN, of_row, strict=True)), row % 4)

    return write_celeba(root, splits, seed=3, picture=picture)


def row(data: CelebA, split: str) -> list[Picture]:
    """The first images of a split."""
    images, targets = data.dataset(split).batch(torch.arange(COLUMNS))
    return [
        (
            image.permute(1, 2, 0).numpy(),
            f"{split} {k}\n"
            + "\n".join(f"{name}: {'yes' if targets[name][k] else 'no'}" for name in SHOWN),
        )
        for k, image in enumerate(images)
    ]


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--out", type=Path, default=Path("docs/images/celeba_samples.png"))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        root = arguments.root or write_drawn(Path(folder))
        data = CelebA(str(root), batch_size=1)
        data.setup()
        of = "CelebA" if arguments.root else "Drawn faces in CelebA's format, not CelebA's images"
        title = f"{of}: 218 x 178 pixels resized to 64 x 64, with five of the forty labels"
        splits = ("train", "val", "test")
        draw(arguments.out, title, [row(data, split) for split in splits], inches=1.8)


if __name__ == "__main__":
    main()
