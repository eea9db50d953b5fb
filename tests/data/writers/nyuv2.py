"""A small NYUv2 in the format of the MTAN pack."""

from pathlib import Path

from tests.data.writers import packs


def write(
    root: Path, train: int = 12, val: int = 4, size: tuple[int, int] = (32, 64), seed: int = 0
) -> Path:
    """Write random images, labels, depths and normals; return ``root``."""
    folders = {
        "image": packs.image,
        "label": packs.labels(13),
        "depth": packs.depth(0.7, 10.0),
        "normal": packs.normals,
    }
    return packs.write(root, folders, train, val, size, seed)
