"""The format of the MTAN packs: a folder per split and quantity, an .npy file per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_flatmtl.data._folders import broken, missing

__all__ = ["Pack", "Quantity"]

INDICES = 5  # how many missing files an error lists


@dataclass(frozen=True)
class Quantity:
    """What the files of a folder hold.

    Args:
        folders: Names that the folder may have, the first one found is read.
        channels: Size of the last dimension, 0 for arrays ``[H, W]``.
        kinds: NumPy's letters of the data types that it may have: ``f`` floating, ``i`` and ``u``
            whole numbers.
    """

    folders: tuple[str, ...]
    channels: int
    kinds: str

    def shape(self, height: int | str, width: int | str) -> tuple[int | str, ...]:
        """The shape that an array of an image must have."""
        return (height, width, self.channels) if self.channels else (height, width)


IMAGE = Quantity(("image",), channels=3, kinds="fu")
DEPTH = Quantity(("depth",), channels=1, kinds="fiu")
NORMALS = Quantity(("normal",), channels=3, kinds="f")


class Pack:
    """The files of one split, looked over once and then read image by image.

    Looking over reads the head of each file only: whether they are there from 0 on without a gap,
    for every quantity the same ones, whole, and of one height and width. Reading maps a file into
    memory and copies it from there.

    Args:
        what: The data set, for errors.
        root: The folder that the user gave.
        split: Its subfolder.
        quantities: What there is to read, by name; ``"image"`` among them.
        layout: How the folder must look, for errors.
        sources: Where to get it, for errors.

    Attributes:
        size: Height and width of every image in pixels.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If a file is not what it should be.
    """

    def __init__(
        self,
        what: str,
        root: Path,
        split: str,
        quantities: Mapping[str, Quantity],
        layout: str,
        sources: str,
    ) -> None:
        self._told: tuple[Any, ...] = (what, root, layout, sources)
        self._root = root
        if not root.is_dir():
            raise self._missing("the folder does not exist")
        self._folders = {name: self._folder(split, q.folders) for name, q in quantities.items()}
        self._count = self._counted()
        self.size = self._first_size()
        for name, quantity in quantities.items():
            for index in range(self._count):
                self._check(self._file(name, index), quantity)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._count

    def read(self, name: str, index: int) -> Tensor:
        """A quantity of an image, float32, channels first; colours in [0, 1] if whole on disk."""
        mapped = np.load(self._file(name, index), mmap_mode="r")
        last_first = np.moveaxis(mapped, -1, 0) if mapped.ndim == 3 else mapped
        values = torch.from_numpy(np.array(last_first, dtype=np.float32, order="C"))
        if name == "image" and mapped.dtype.kind == "u":
            values /= float(np.iinfo(mapped.dtype).max)
        return values

    def read_labels(self, name: str, index: int, classes: int) -> Tensor:
        """The classes of an image's pixels, int64, -1 where there is no label.

        Raises:
            ValueError: If there are others than -1 and 0 to ``classes - 1``.
        """
        values = self.read(name, index)
        labels = values.to(torch.int64)
        lowest, highest = labels.aminmax()
        if lowest < -1 or highest >= classes or not torch.equal(labels.to(values.dtype), values):
            found = values[(labels != values) | (labels < -1) | (labels >= classes)][0].item()
            path = self._shown(self._file(name, index))
            raise self._broken(
                f"`{path}` must hold classes from -1 to {classes - 1}, got {found:g}"
            )
        return labels

    def _folder(self, split: str, names: tuple[str, ...]) -> Path:
        for name in names:
            if (path := self._root / split / name).is_dir():
                return path
        raise self._missing(
            f"the folder `{'` or `'.join(f'{split}/{name}' for name in names)}` is missing"
        )

    def _counted(self) -> int:
        """The number of images, the same for every quantity."""
        indices = {name: self._indices(folder) for name, folder in self._folders.items()}
        together = set[int]().union(*indices.values())
        for name, folder in self._folders.items():
            absent = sorted(set(range(max(together, default=0) + 1)) - indices[name])
            if absent:
                files = ", ".join(f"{index}.npy" for index in absent[:INDICES])
                more = f" and {len(absent) - INDICES} more" if len(absent) > INDICES else ""
                raise self._missing(f"`{self._shown(folder)}` lacks {files}{more}")
        return len(together)

    def _indices(self, folder: Path) -> set[int]:
        """The numbers of a folder's files; hidden files, which archives leave behind, are none."""
        names = {path.stem for path in folder.glob("*.npy") if path.name[0] != "."}
        strange = sorted(
            name for name in names if not (name.isdecimal() and str(int(name)) == name)
        )
        if strange:
            raise self._broken(
                f"files of `{self._shown(folder)}` must be called 0.npy, 1.npy and so on, "
                f"got {strange[0]}.npy"
            )
        return {int(name) for name in names}

    def _first_size(self) -> tuple[int, int]:
        path = self._file("image", 0)
        shape = self._mapped(path).shape
        if len(shape) != 3:
            raise self._broken(
                f"`{self._shown(path)}` must have shape [H, W, 3], got {list(shape)}"
            )
        return shape[0], shape[1]

    def _check(self, path: Path, quantity: Quantity) -> None:
        array = self._mapped(path)
        expected = quantity.shape(*self.size)
        if array.shape != expected:
            raise self._broken(
                f"`{self._shown(path)}` must have shape {list(expected)}, the first image's size, "
                f"got {list(array.shape)}"
            )
        if array.dtype.kind not in quantity.kinds:
            kinds = {"f": "floating", "i": "signed", "u": "unsigned"}
            allowed = " or ".join(kinds[kind] for kind in quantity.kinds)
            raise self._broken(
                f"`{self._shown(path)}` must be of {allowed} type, got {array.dtype}"
            )

    def _mapped(self, path: Path) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise self._broken(
                f"`{self._shown(path)}` is not a whole .npy file ({error})"
            ) from error
        return array

    def _file(self, name: str, index: int) -> Path:
        return self._folders[name] / f"{index}.npy"

    def _shown(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _missing(self, found: str) -> FileNotFoundError:
        what, root, layout, sources = self._told
        return missing(what, root, found, layout, sources)

    def _broken(self, found: str) -> ValueError:
        what, root, layout, sources = self._told
        return broken(what, root, found, layout, sources)
