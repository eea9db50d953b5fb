"""Draw pairs of every variant of MultiMNIST with their labels.

python examples/sample_sheets/multimnist.py --root data --out docs/images/multimnist_samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sheet import Picture, draw

from lightning_flatmtl.data import MultiMNIST

CLOTHES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
DIGITS = tuple(map(str, range(10)))
NAMES = {"mnist": (DIGITS, DIGITS), "fashion": (CLOTHES, CLOTHES), "mixed": (DIGITS, CLOTHES)}


def row(root: str, variant: str, max_shift: int, split: str) -> list[Picture]:
    """Eight pairs of a split."""
    data = MultiMNIST(
        root, variant, train_pairs=8, val_pairs=8, test_pairs=8, batch_size=8, max_shift=max_shift
    )
    data.setup()
    left, right = NAMES[variant]
    pictures = []
    for index in range(8):
        image, target = data.dataset(split)[index]
        caption = f"{left[target['left']]} / {right[target['right']]}"
        pictures.append((image[0].numpy(), caption))
    return pictures


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", type=Path, default=Path("multimnist_samples.png"))
    arguments = parser.parse_args()
    rows = [
        row(arguments.root, variant, max_shift, split)
        for variant in NAMES
        for max_shift, split in ((4, "train"), (0, "test"))
    ]
    title = (
        "MultiMNIST, top-left / bottom-right: mnist, fashion, mixed; of each, training pairs with "
        "shifts of up to 4 pixels, then test pairs without"
    )
    draw(arguments.out, title, rows)


if __name__ == "__main__":
    main()
