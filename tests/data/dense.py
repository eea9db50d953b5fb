"""What the tests of both dense data modules share: ways to spoil a pack."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an array")


def saved(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Write the same file with its array changed."""

    def spoil(path: Path) -> None:
        np.save(path, change(np.load(path)))

    return spoil


def renamed(name: str) -> Callable[[Path], None]:
    return lambda path: path.rename(path.with_name(name)) and None


SPOILT: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # What is spoilt, how, and what the error must say.
    "a file is missing in the middle": (
        "train/depth/3.npy", Path.unlink, r"`train/depth` lacks 3\.npy\."),
    "the last file is missing": (
        "train/image/11.npy", Path.unlink, r"`train/image` lacks 11\.npy\."),
    "the first label of the test images is missing": (
        "val/label/0.npy", Path.unlink, r"`val/label` lacks 0\.npy\."),
    "a file with another name": (
        "train/depth/3.npy", renamed("three.npy"), r"must be called 0\.npy, .*, got three\.npy"),
    "a number with zeros": (
        "train/depth/3.npy", renamed("03.npy"), r"must be called 0\.npy, .*, got 03\.npy"),
    "a truncated file": (
        "train/label/5.npy", truncated, r"`train/label/5\.npy` is not a whole \.npy file"),
    "an empty file": (
        "val/depth/2.npy", empty, r"`val/depth/2\.npy` is not a whole \.npy file"),
    "a text": (
        "train/image/0.npy", text, r"`train/image/0\.npy` is not a whole \.npy file"),
    "Python objects": (
        "train/depth/2.npy", saved(lambda a: a.astype(object)),
        r"`train/depth/2\.npy` is not a whole \.npy file"),
    "an image of another size": (
        "train/image/4.npy", saved(lambda a: a[:-1]),
        r"`train/image/4\.npy` must have shape \[32, 64, 3\].*got \[31, 64, 3\]"),
    "a label of another size": (
        "val/label/1.npy", saved(lambda a: a[:, :-2]),
        r"`val/label/1\.npy` must have shape \[32, 64\].*got \[32, 62\]"),
    "labels with a channel": (
        "train/label/1.npy", saved(lambda a: a[..., None]),
        r"`train/label/1\.npy` must have shape \[32, 64\].*got \[32, 64, 1\]"),
    "depths without a channel": (
        "train/depth/1.npy", saved(lambda a: a[..., 0]),
        r"`train/depth/1\.npy` must have shape \[32, 64, 1\].*got \[32, 64\]"),
    "images with the channels first": (
        "train/image/1.npy", saved(lambda a: np.moveaxis(a, -1, 0)),
        r"`train/image/1\.npy` must have shape \[32, 64, 3\].*got \[3, 32, 64\]"),
    "a grey first image": (
        "train/image/0.npy", saved(lambda a: a[..., 0]),
        r"`train/image/0\.npy` must have shape \[H, W, 3\], got \[32, 64\]"),
    "complex depths": (
        "train/depth/1.npy", saved(lambda a: a.astype(complex)),
        r"`train/depth/1\.npy` must be of floating or .* type, got complex128"),
    "labels of yes and no": (
        "train/label/1.npy", saved(lambda a: a > 3),
        r"`train/label/1\.npy` must be of .* type, got bool"),
    "signed images": (
        "train/image/1.npy", saved(lambda a: a.astype(np.int16)),
        r"`train/image/1\.npy` must be of floating or unsigned type, got int16"),
}  # fmt: skip
