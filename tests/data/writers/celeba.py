"""CelebA in small: the files of torchvision's CelebA, a few faces that can be told apart."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_flatmtl.data import CelebA

SIZE = (218, 178)
SPLITS = (6, 4, 4)


def labels(count: int, seed: int = 0) -> np.ndarray:
    """1 or -1, int64 ``[images, 40]``."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2, (count, len(CelebA.ATTRIBUTES))) * 2 - 1


def face(row: int, seed: int = 0) -> torch.Tensor:
    """A smooth picture of its own for every row, uint8 ``[3, 218, 178]``."""
    generator = torch.Generator().manual_seed(1000 * seed + row)
    coarse = torch.randint(0, 256, (1, 3, 7, 6), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear", align_corners=True)
    return smooth[0].round().to(torch.uint8)


def write_picture(path: Path, picture: torch.Tensor) -> None:
    """Write a JPEG.

    Args:
        path: Its file.
        picture: uint8 ``[3, height, width]``.
    """
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=95)


def write_celeba(
    root: Path,
    splits: Sequence[int] = SPLITS,
    seed: int = 0,
    picture: Callable[[int, int], torch.Tensor] = face,
) -> Path:
    """Write lists and images, splits one after another as in the true list.

    Args:
        root: The folder that gets ``celeba``.
        splits: Images of training, validation and test.
        seed: Seed of images and labels.
        picture: Gives the image of a row and the seed, uint8 ``[3, 218, 178]``.
    """
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    count = sum(splits)
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    for row, name in enumerate(names):
        write_picture(base / "img_align_celeba" / name, picture(row, seed))
    table = [" ".join(f"{value:2d}" for value in row) for row in labels(count, seed)]
    header = [str(count), " ".join(CelebA.ATTRIBUTES) + " "]  # the true header ends with a space
    _write(base / "list_attr_celeba.txt", header, names, table)
    of = [str(split) for split, images in enumerate(splits) for _ in range(images)]
    _write(base / "list_eval_partition.txt", [], names, of)
    # What torchvision wants beside them.
    _write(base / "identity_CelebA.txt", [], names, [str(row) for row in range(count)])
    box = [str(count), "image_id x_1 y_1 width height"]
    _write(base / "list_bbox_celeba.txt", box, names, ["95 71 226 313"] * count)
    points = " ".join(
        f"{point}_{axis}"
        for point in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
        for axis in "xy"
    )
    where = ["69 109 106 113 77 142 73 152 108 154"] * count
    _write(base / "list_landmarks_align_celeba.txt", [str(count), points], names, where)
    return root


def _write(path: Path, header: Sequence[str], names: Sequence[str], rest: Sequence[str]) -> None:
    rows = [f"{name} {words}" for name, words in zip(names, rest, strict=True)]
    path.write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")
