"""A small Cityscapes in the format of the MTAN pack."""

from pathlib import Path

from tests.data.writers import packs


def write(
    root: Path,
    train: int = 16,
    val: int = 4,
    size: tuple[int, int] = (32, 64),
    seed: int = 0,
    labels: str = "label",
) -> Path:
    """Write random images, labels (into the folder of that name) and inverse depths."""
    folders = {"image": packs.image, labels: packs.labels(7), "depth": packs.depth(0.001, 0.5)}
    return packs.write(root, folders, train, val, size, seed)
