"""What the data modules of dense prediction share: splits, augmentation, loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.transforms import v2
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._splits import Split, SplitModule
from lightning_flatmtl.data.dense.images import DenseImages, ImagesAlone, Transform
from lightning_flatmtl.data.dense.pack import Pack, Quantity
from lightning_flatmtl.data.dense.random_scale_crop import RandomScaleCrop

__all__ = ["DenseDataModule"]

RUN = 8
"""Images in a row that are held out together: neighbours often show the same place."""


class DenseDataModule(SplitModule[DenseImages]):
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
        super().__init__(batch_size, num_workers, pin_memory)
        check(0 <= val_fraction < 1, "val_fraction", "in [0, 1)", val_fraction)
        check(seed >= 0, "seed", "at least 0", seed)
        self.root, self.val_fraction, self.seed = root, val_fraction, seed
        self.augment, self.transform = augment, transform
        self.indices: dict[Split, Tensor] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Look the files over and hold validation images out; a second call changes nothing.

        Raises:
            FileNotFoundError: If the folder, or a folder or a file in it, is missing.
            ValueError: If a file is not what it should be, or a split remains without images.
        """
        if self.indices:
            return
        packs = {folder: self._pack(folder) for folder in ("train", "val")}
        sizes = {folder: pack.size for folder, pack in packs.items()}
        if sizes["train"] != sizes["val"]:
            raise ValueError(
                f"{self.what}: images of `train` and `val` must be of one size, got {sizes}."
            )
        train, val = self._held_out(len(packs["train"]))
        self.indices = {"train": train, "val": val, "test": torch.arange(len(packs["val"]))}
        self._datasets = {
            "train": self._images(packs["train"], train, self._training_transform()),
            "val": self._images(packs["train"], val),
            "test": self._images(packs["val"], self.indices["test"]),
        }

    @override
    def inputs(self) -> ImagesAlone:
        """Return the test images alone."""
        return ImagesAlone(self.dataset("test"))

    @override
    def val_dataloader(self) -> Any:
        return super().val_dataloader() if len(self.dataset("val")) else []

    def _pack(self, folder: str) -> Pack:
        what = f"{self.what} (`root`)"
        root = Path(self.root).expanduser()
        return Pack(what, root, folder, self.quantities, self.layout, self.sources)

    def _images(self, pack: Pack, rows: Tensor, transform: Transform | None = None) -> DenseImages:
        tasks = [name for name in self.quantities if name != "image"]
        return DenseImages(pack, rows.tolist(), tasks, self.num_classes, transform)

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
