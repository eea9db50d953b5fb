"""What MTAN's packs have in common: a folder per split and quantity, an .npy file per image."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def write(
    root: Path,
    folders: Mapping[str, Draw],
    train: int,
    val: int,
    size: tuple[int, int],
    seed: int,
) -> Path:
    """Write ``root/{train,val}/{folder}/{i}.npy``, drawn by the folder's function."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for folder, draw in folders.items():
            (root / split / folder).mkdir(parents=True)
            for index in range(count):
                np.save(root / split / folder / f"{index}.npy", draw(random, size))
    return root


def image(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Colours in [0, 1]."""
    return random.uniform(size=(*size, 3))


def labels(classes: int) -> Draw:
    """Classes in rectangles, -1 among them: pixels without a label."""

    def draw(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        coarse = random.integers(-1, classes, size=(4, 8))
        rows, columns = (np.arange(s) * c // s for s, c in zip(size, coarse.shape, strict=True))
        return coarse[np.ix_(rows, columns)].astype(np.float64)

    return draw


def depth(nearest: float, farthest: float) -> Draw:
    """Values between the two, a tenth of them zero: pixels without a label."""

    def draw(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        values = random.uniform(nearest, farthest, size=(*size, 1))
        return values * (random.uniform(size=values.shape) > 0.1)

    return draw


def normals(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Unit vectors towards the camera (z > 0), a tenth of them zero: pixels without a label."""
    vectors = random.normal(size=(*size, 3))
    vectors[..., 2] = np.abs(vectors[..., 2])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors * (random.uniform(size=(*size, 1)) > 0.1)
