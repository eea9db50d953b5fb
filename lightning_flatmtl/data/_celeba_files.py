"""CelebA's files on disk, as torchvision lays them out: which images, labels, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.data._folders import broken, missing
from lightning_flatmtl.data._splits import SPLITS, Split

__all__ = ["ATTRIBUTES", "CelebAFiles", "broken_celeba", "read_celeba"]

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs",
    "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows",
    "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup",
    "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard",
    "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns",
    "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip
"""The attributes in the order of the header of ``list_attr_celeba.txt``."""

_LAYOUT = """
celeba/img_align_celeba/000001.jpg ... 202599.jpg   aligned and cropped faces, 178 x 218
celeba/list_attr_celeba.txt                         40 attributes of each, 1 or -1
celeba/list_eval_partition.txt                      0 train, 1 validation, 2 test"""

_SOURCES = """
- `CelebA(root, download=True)`: torchvision's own download (needs `pip install gdown`)
- https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html: img_align_celeba.zip (unpack it),
  list_attr_celeba.txt and list_eval_partition.txt"""


@dataclass(frozen=True)
class CelebAFiles:
    """What the lists say.

    Args:
        images: The folder of the images.
        names: Their file names, in the order of the lists.
        labels: 0 or 1, uint8 ``[40, images]``, attributes in the order of :data:`ATTRIBUTES`.
        rows: The rows of each split, int64, under ``"train"``, ``"val"`` and ``"test"``.
    """

    images: Path
    names: tuple[str, ...]
    labels: Tensor
    rows: dict[Split, Tensor]

    def path(self, row: int) -> Path:
        """The image of a row."""
        return self.images / self.names[row]


def read_celeba(root: Path) -> CelebAFiles:
    """Read both lists and see that every image is there.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If a list is not what it should be.
    """
    base = root / "celeba"
    if not base.is_dir():
        raise missing("CelebA (`root`)", root, "`celeba` is missing", _LAYOUT, _SOURCES)
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"):
        if not (base / name).exists():
            found = f"`celeba/{name}` is missing"
            raise missing("CelebA (`root`)", root, found, _LAYOUT, _SOURCES)
    names, labels = _attributes(root, base / "list_attr_celeba.txt")
    splits = _partition(root, base / "list_eval_partition.txt", names)
    images = base / "img_align_celeba"
    there = {entry.name for entry in images.iterdir()}
    absent = [name for name in names if name not in there]
    if absent:
        found = f"{len(absent)} of {len(names)} images are missing, the first is `{absent[0]}`"
        raise missing("CelebA (`root`)", root, found, _LAYOUT, _SOURCES)
    # The file has 0, 1 and 2, in the order of the splits.
    rows = {split: (splits == k).nonzero().flatten() for k, split in enumerate(SPLITS)}
    return CelebAFiles(images, names, labels, rows)


def broken_celeba(root: Path, found: str) -> ValueError:
    """The error of files that are there and cannot be used."""
    return broken("CelebA (`root`)", root, found, _LAYOUT, _SOURCES)


def _attributes(root: Path, path: Path) -> tuple[tuple[str, ...], Tensor]:
    """A line with the number of images, one with the attributes, and a line for each image."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise broken_celeba(root, f"`celeba/{path.name}` does not begin with the number of images")
    if tuple(lines[1].split()) != ATTRIBUTES:
        raise broken_celeba(root, f"line 2 of `celeba/{path.name}` is not the 40 attributes")
    names, table = _table(root, path, lines[2:], len(ATTRIBUTES), (-1, 1), skipped=2)
    if len(names) != int(lines[0]):
        found = f"`celeba/{path.name}` tells of {lines[0].strip()} images and has {len(names)}"
        raise broken_celeba(root, found)
    return names, torch.from_numpy((table.T == 1).astype(np.uint8))


def _partition(root: Path, path: Path, names: tuple[str, ...]) -> Tensor:
    lines = path.read_text(encoding="utf-8").splitlines()
    listed, table = _table(root, path, lines, 1, (0, 1, 2), skipped=0)
    if listed != names:
        found = f"`celeba/{path.name}` does not list the images of `celeba/list_attr_celeba.txt`"
        raise broken_celeba(root, found)
    splits = torch.from_numpy(table[:, 0])
    for number, split in enumerate(SPLITS):
        if not (splits == number).any():
            raise broken_celeba(root, f"`celeba/{path.name}` has no image of {split} ({number})")
    return splits


def _table(
    root: Path, path: Path, lines: Sequence[str], width: int, values: Sequence[int], skipped: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and numbers, int64 ``[lines, width]``, of lines such as ``000001.jpg -1 1``."""
    kept = [(number, line) for number, line in enumerate(lines, 1 + skipped) if line.strip()]
    allowed = {str(value): value for value in values}
    names, table = [], np.empty((len(kept), width), dtype=np.int64)
    for row, (number, line) in enumerate(kept):
        name, *words = line.split()
        if len(words) != width or not allowed.keys() >= set(words):
            expected = f"an image and {width} of {', '.join(allowed)}"
            raise broken_celeba(root, f"line {number} of `celeba/{path.name}` must be {expected}")
        names.append(name)
        table[row] = [allowed[word] for word in words]
    if len(set(names)) != len(names):
        raise broken_celeba(root, f"`celeba/{path.name}` lists an image more than once")
    return tuple(names), table
