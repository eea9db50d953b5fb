"""What the data modules of dense prediction share: splits, augmentation, loaders."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data.dense.images import DenseImages, ImagesAlone, Sample, Transform
from lightning_flatmtl.data.dense.pack import Pack, Quantity
from lightning_flatmtl.data.dense.random_scale_crop import RandomScaleCrop

__all__ = ["DenseDataModule", "Split"]

Split = Literal["train", "val", "test"]
T = TypeVar("T")

RUN = 8
"""Images in a row that are held out together: neighbours often show the same place."""


class DenseDataModule(pl.LightningDataModule, ABC):
    """Reads a pack of MTAN; a subclass says what is in it.

    Attributes:
        indices: After ``setup``, which files a split consists of, sorted int64: ``"train"`` and
            ``"val"`` number those of the folder ``train``, ``"test"`` those of ``val``.
    """

    what: ClassVar[str]
    num_classes: ClassVar[int]
    quantities: ClassVar[Mapping[str, Quantity]]
    layout: ClassVar[str]
    sources: ClassVar[str]

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        val_fraction: float,
        seed: int,
        augment: bool,
        transform: Transform | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__()
        check(batch_size >= 1, "batch_size", "at least 1", batch_size)
        check(0 <= val_fraction < 1, "val_fraction", "in [0, 1)", val_fraction)
        check(seed >= 0, "seed", "at least 0", seed)
        check(num_workers >= 0, "num_workers", "at least 0", num_workers)
        self.root, self.batch_size, self.val_fraction = root, batch_size, val_fraction
        self.seed, self.augment, self.transform = seed, augment, transform
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.indices: dict[Split, Tensor] = {}
        self._packs: dict[str, Pack] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Look the files over and hold validation images out; a second call changes nothing.

        Raises:
            FileNotFoundError: If the folder, or a folder or a file in it, is missing.
            ValueError: If a file is not what it should be, or a split remains without images.
        """
        if self.indices:
            return
        self._packs = {folder: self._pack(folder) for folder in ("train", "val")}
        sizes = {folder: pack.size for folder, pack in self._packs.items()}
        if sizes["train"] != sizes["val"]:
            raise ValueError(
                f"{self.what}: images of `train` and `val` must be of one size, got {sizes}."
            )
        train, val = self._held_out(len(self._packs["train"]))
        self.indices = {"train": train, "val": val, "test": torch.arange(len(self._packs["val"]))}

    def dataset(self, split: Split) -> DenseImages:
        """Return the data set of a split; that of ``"train"`` augments.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: If ``setup`` has not run.
        """
        pack = self._read("val" if split == "test" else "train")
        return DenseImages(
            pack,
            self.indices[split].tolist(),
            [name for name in self.quantities if name != "image"],
            self.num_classes,
            self._training_transform() if split == "train" else None,
        )

    @override
    def train_dataloader(self) -> DataLoader[Sample]:
        images = self.dataset("train")
        ranks = self.trainer.world_size if self.trainer is not None else 1
        check(
            self.batch_size <= math.ceil(len(images) / ranks),
            "batch_size",
            f"at most training images / processes = {len(images)} / {ranks}",
            self.batch_size,
        )
        return self._loader(images, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> Any:
        images = self.dataset("val")
        return self._loader(images) if len(images) else []

    @override
    def test_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(ImagesAlone(self._read("val")))

    def _pack(self, folder: str) -> Pack:
        what = f"{self.what} (`root`)"
        root = Path(self.root).expanduser()
        return Pack(what, root, folder, self.quantities, self.layout, self.sources)

    def _read(self, folder: str) -> Pack:
        if not self._packs:
            raise RuntimeError("The data have not been looked over yet: call `setup()` first.")
        return self._packs[folder]

    def _training_transform(self) -> Transform | None:
        published = [RandomScaleCrop(), v2.RandomHorizontalFlip()] if self.augment else []
        own = [self.transform] if self.transform is not None else []
        return v2.Compose([*published, *own]) if published or own else None

    def _held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Which training images remain and which are for validation, in runs of neighbours."""
        generator = torch.Generator().manual_seed(self.seed)
        runs = torch.split(torch.arange(count), RUN)
        order = torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator)])
        held_out = round(self.val_fraction * count)
        if held_out == count or (held_out == 0 and self.val_fraction > 0):
            raise ValueError(
                f"`val_fraction` must leave images for training and for validation, or be 0, "
                f"got {self.val_fraction} of {count} images."
            )
        return order[held_out:].sort().values, order[:held_out].sort().values

    def _loader(
        self, dataset: Dataset[T], shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[T]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
        )
