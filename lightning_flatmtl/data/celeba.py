"""CelebA: forty attributes of a face, a task each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from typing_extensions import override

from lightning_flatmtl.data._celeba_files import (
    ATTRIBUTES,
    CelebAFiles,
    broken_celeba,
    read_celeba,
)
from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._image_cache import ImageCache
from lightning_flatmtl.data._in_memory import InMemory
from lightning_flatmtl.data._splits import SplitModule
from lightning_flatmtl.hosting.names import nearest

__all__ = ["CelebA"]

Batch = tuple[Tensor, dict[str, Tensor]]


class Decoder:
    """Decodes images anew every time they are asked for.

    Args:
        files: Where they are.
        size: Height and width that they get.
        root: What messages call the data set.
    """

    def __init__(self, files: CelebAFiles, size: int, root: Path) -> None:
        self._files, self._size, self._root = files, size, root

    def one(self, row: int) -> Tensor:
        """The image of a row, uint8 ``[3, size, size]``."""
        path, sides = self._files.path(row), (self._size, self._size)
        try:
            with Image.open(path) as image:
                resized = image.convert("RGB").resize(sides, Image.Resampling.BILINEAR)
        except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
            found = f"`{path.name}` cannot be decoded: {error}"
            raise broken_celeba(self._root, found) from error
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.stack([self.one(row) for row in rows.tolist()])


class Mapped:
    """Takes images out of a filled cache.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache
        self._opened: np.ndarray | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        if self._opened is None:
            self._opened = self._cache.open()
        return torch.from_numpy(self._opened[rows.numpy()])

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would be all the pixels; a worker process maps the file itself.
        return {**self.__dict__, "_opened": None}


class Faces(InMemory[Batch]):
    """The images of a split with their labels.

    Args:
        pixels: Gives images of rows of the lists, uint8.
        rows: The rows of the split, int64 ``[images]``.
        attributes: Names of the tasks.
        labels: 0 or 1, uint8 ``[tasks, images]``.
    """

    def __init__(
        self,
        pixels: Decoder | Mapped,
        rows: Tensor,
        attributes: tuple[str, ...],
        labels: Tensor,
    ) -> None:
        self._pixels, self._rows = pixels, rows
        self.attributes, self.labels = attributes, labels

    def __len__(self) -> int:
        return len(self._rows)

    @override
    def batch(self, rows: Tensor) -> Batch:
        images = self._pixels(self._rows[rows]).float().div_(255)
        labels = self.labels[:, rows].long()
        return images, dict(zip(self.attributes, labels, strict=True))


class CelebA(SplitModule[Faces]):
    """Forty binary attributes of 202,599 faces, a task each.

    The data are those of `Liu et al., 2015 <https://arxiv.org/abs/1411.7766>`_ in the files of
    ``torchvision.datasets.CelebA``, with the official partition: 162,770 images to train with,
    19,867 for validation, 19,962 for testing, no person in two of them. Of the lists only the
    attributes and the partition are read.

    A batch is ``(images, {attribute: labels})``: images float32 ``[batch, 3, size, size]`` in
    [0, 1], RGB, labels int64 ``[batch]``, 1 where the face has the attribute. The aligned image of
    218 x 178 pixels is resized as a whole, by Pillow's bilinear filter (which antialiases), so that
    its sides shrink unequally, as in the published experiments. Those subtract the mean colour
    too; here the network's first normalisation does. There is no augmentation. The prediction
    loader yields the test images alone.

    Decoding is slow: with ``cache`` every image is decoded once, into a file of ``3 size^2`` bytes
    an image (2.5 GB at 64 pixels) that is mapped into memory. What is broken off goes on.

    Args:
        root: The folder that holds ``celeba``.
        attributes: The attributes that are tasks, in this order; all forty by default.
        size: Height and width of an image in pixels, at least 1.
        cache: The folder of the decoded images; without one they are decoded anew every time.
        download: Whether torchvision fetches what is missing (``pip install gdown``). It compares
            checksums of all lists.
        batch_size: Images in a batch (per process), at least 1. The last, incomplete batch of
            training is left out.
        num_workers: Worker processes of every loader, and to fill the cache, at least 0. With a
            filled cache 0 is usually enough.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Attributes:
        ATTRIBUTES: The names of all forty, in the order of the files.

    Raises:
        ValueError: If an argument is out of its bounds, files are broken or a cache does not fit.
        FileNotFoundError: In ``setup``, if files are missing; it says which, and where they are.

    Example:
        >>> from lightning_flatmtl.data import CelebA
        >>> data = CelebA("data", attributes=["Smiling", "Young"], cache="data/celeba_cache")
        >>> len(CelebA.ATTRIBUTES), CelebA.ATTRIBUTES[0]
        (40, '5_o_Clock_Shadow')
    """

    ATTRIBUTES = ATTRIBUTES

    def __init__(
        self,
        root: str = "data",
        attributes: list[str] | None = None,
        size: int = 64,
        cache: str | None = None,
        download: bool = False,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory)
        check(size >= 1, "size", "at least 1", size)
        self.root, self.size, self.download = Path(root), size, download
        self.attributes = _known(attributes)
        self.cache = None if cache is None else Path(cache)

    @override
    def prepare_data(self) -> None:
        """Download if that is asked for, and fill the cache."""
        if self.download:
            datasets.CelebA(str(self.root), download=True)
        if self.cache is not None:
            self._pixels(read_celeba(self.root))

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the lists; a second call, whatever its stage, changes nothing."""
        if self._datasets:
            return
        files = read_celeba(self.root)
        pixels = self._pixels(files)
        columns = torch.tensor([ATTRIBUTES.index(name) for name in self.attributes])
        self._datasets = {
            split: Faces(pixels, rows, self.attributes, files.labels[columns][:, rows])
            for split, rows in files.rows.items()
        }

    def _pixels(self, files: CelebAFiles) -> Decoder | Mapped:
        decoder = Decoder(files, self.size, self.root)
        if self.cache is None:
            return decoder
        count, size = len(files.names), self.size
        path = self.cache / f"celeba_{size}x{size}_{count}.npy"
        cache = ImageCache(path, count, size, decoder.one)
        cache.fill(self.num_workers)
        return Mapped(cache)


def _known(attributes: list[str] | None) -> tuple[str, ...]:
    if attributes is None:
        return ATTRIBUTES
    for name in attributes:
        if name not in ATTRIBUTES:
            raise ValueError(
                "`attributes` must be of CelebA's forty (`CelebA.ATTRIBUTES`), got "
                f"{name!r}. {nearest(name, ATTRIBUTES)}".rstrip()
            )
    if not attributes or len(set(attributes)) != len(attributes):
        got = "some more than once" if attributes else "none"
        raise ValueError(f"`attributes` must be different names, at least one, got {got}.")
    return tuple(attributes)
