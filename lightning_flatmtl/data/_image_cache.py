"""Images decoded once into a memory-mapped file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

__all__ = ["ImageCache"]

_CHUNK = 512  # images between two marks of progress
_NEAR = 8.0  # mean difference, of 255, that two decoders of one image stay below


class ImageCache:
    """Pixels of many images in one ``.npy`` file, uint8 ``[images, 3, size, size]``.

    The file appears when it is whole: it is filled under another name, with a mark of how far it
    is beside it, so that what was broken off goes on. A lock lets one process fill it.

    Args:
        path: The file.
        count: The number of images.
        size: Their height and width in pixels.
        decode: Gives the image of a row, uint8 ``[3, size, size]``.
    """

    def __init__(self, path: Path, count: int, size: int, decode: Callable[[int], Tensor]) -> None:
        self.path, self.shape, self._decode = path, (count, 3, size, size), decode

    def fill(self, num_workers: int = 0) -> None:
        """Decode what is not decoded yet; nothing if all is, after a look at three of the images.

        Args:
            num_workers: Processes that decode.

        Raises:
            ValueError: If the file is not of these images.
        """
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._beside(".lock")):
                if not self.path.is_file():  # another process was quicker
                    self._decode_all(num_workers)
        self._compare()

    def open(self) -> np.ndarray:
        """The pixels, mapped and read as they are asked for.

        Raises:
            ValueError: If the file has other sizes.
        """
        found = "cannot be read"
        try:
            pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self._unfit(found) from error
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise self._unfit(f"holds {pixels.dtype} {list(pixels.shape)}")
        mapped: np.ndarray = pixels
        return mapped

    def _decode_all(self, num_workers: int) -> None:
        part, mark = self._beside(".part"), self._beside(".rows")
        done = _marked(mark) if part.is_file() else 0
        pixels = np.lib.format.open_memmap(
            part, mode="r+" if done else "w+", dtype=np.uint8, shape=self.shape
        )
        if pixels.shape != self.shape:
            raise self._unfit(f"is begun as {list(pixels.shape)}", part)
        rows = _Decoded(self._decode, range(done, self.shape[0]))
        for chunk in DataLoader(rows, batch_size=_CHUNK, num_workers=num_workers):
            pixels[done : done + len(chunk)] = chunk.numpy()
            done += len(chunk)
            pixels.flush()
            _write_mark(mark, done)
        del pixels
        os.replace(part, self.path)
        mark.unlink(missing_ok=True)

    def _compare(self) -> None:
        """A file of as many other images would train on wrong labels without an error."""
        pixels, count = self.open(), self.shape[0]
        for row in sorted({0, count // 2, count - 1}):
            apart = np.abs(pixels[row].astype(float) - self._decode(row).numpy()).mean()
            if apart > _NEAR:
                raise self._unfit(f"holds another image than the folder in row {row}")

    def _unfit(self, found: str, path: Path | None = None) -> ValueError:
        return ValueError(
            f"The cache '{path or self.path}' must hold uint8 {list(self.shape)} of the images in "
            f"the folder, and {found}. Delete it, or choose another folder for `cache`."
        )

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)


class _Decoded(Dataset[Tensor]):
    def __init__(self, decode: Callable[[int], Tensor], rows: range) -> None:
        self._decode, self._rows = decode, rows

    def __len__(self) -> int:
        return len(self._rows)

    @override
    def __getitem__(self, index: int) -> Tensor:
        return self._decode(self._rows[index])


def _marked(mark: Path) -> int:
    try:
        return int(mark.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def _write_mark(mark: Path, done: int) -> None:
    fresh = mark.with_name(mark.name + ".new")
    fresh.write_text(str(done), encoding="ascii")
    os.replace(fresh, mark)
