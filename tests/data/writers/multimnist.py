"""MNIST's idx files, small."""

import struct
from pathlib import Path

import numpy as np

SPLITS = {"train": 60, "t10k": 30}


def write_idx(path: Path, array: np.ndarray) -> None:
    """An idx file of bytes: two zeros, the type 8, the number of axes, big-endian sizes, data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write(root: Path, sizes: dict[str, int] | None = None) -> Path:
    """Both data sets; a single image's pixels tell the set, the split, its row and its class.

    Pixel (0, 0) is the row, (0, 1) the class, (0, 2) is 100 for MNIST and 200 for Fashion-MNIST,
    plus 1 for test; all others 50 plus the class.
    """
    for number, name in enumerate(("MNIST", "FashionMNIST")):
        for split, size in (sizes or SPLITS).items():
            labels = (np.arange(size) * (3 if name == "MNIST" else 7)) % 10
            images = np.repeat(50 + labels, 28 * 28).reshape(size, 28, 28)
            images[:, 0, 0], images[:, 0, 1] = np.arange(size), labels
            images[:, 0, 2] = 100 * (number + 1) + (split == "t10k")
            raw = root / name / "raw"
            write_idx(raw / f"{split}-images-idx3-ubyte", images)
            write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
    return root
