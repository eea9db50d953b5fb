"""Two single images in one, a task for each: what MultiDigits and MultiMNIST have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._in_memory import InMemory, loader

__all__ = ["SPLITS", "TASKS", "ImagePairs", "PairModule", "Split"]

Batch = tuple[Tensor, dict[str, Tensor]]
Split = Literal["train", "val", "test"]
T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "val", "test")
TASKS = ("left", "right")
# One random stream each; new ones come last, so that the others stay what they are.
STREAMS = (
    "split", "train", "val", "test", "noise", "ood", "shift train", "shift val", "shift test",
)  # fmt: skip


class ImagePairs(InMemory[Batch]):
    """Composed images and the labels of both parts.

    Attributes:
        images: Float32 in [0, 1], or uint8 that a batch turns into such, ``[pairs, 1, h, w]``.
        targets: Int64 ``[pairs]`` per task.
    """

    images: Tensor
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.images)

    @override
    def batch(self, rows: Tensor) -> Batch:
        targets = {task: labels[rows] for task, labels in self.targets.items()}
        return floats(self.images[rows]), targets


class PairModule(pl.LightningDataModule):
    """Splits, loaders and random streams; a subclass composes the pairs.

    Args:
        pairs: Number of pairs of every split, at least 1.
        batch_size: Pairs in a batch (per process), at least 1.
        seed: Seed of all random streams, at least 0.
        num_workers: Worker processes of every loader, at least 0.
        pin_memory: Whether loaders copy batches to page-locked memory.
    """

    def __init__(
        self,
        pairs: dict[Split, int],
        batch_size: int,
        seed: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__()
        for split, count in pairs.items():
            check(count >= 1, f"{split}_pairs", "at least 1", count)
        check(batch_size >= 1, "batch_size", "at least 1", batch_size)
        most = f"at most `train_pairs` = {pairs['train']}"
        check(batch_size <= pairs["train"], "batch_size", most, batch_size)
        check(seed >= 0, "seed", "at least 0", seed)
        check(num_workers >= 0, "num_workers", "at least 0", num_workers)
        self.pairs, self.seed = pairs, seed
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory

    @abstractmethod
    def dataset(self, split: Split) -> ImagePairs:
        """Return a split's pairs; RuntimeError before ``setup``."""

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        pairs = self.dataset("train")
        ranks = self.trainer.world_size if self.trainer is not None else 1
        check(
            self.batch_size <= math.ceil(len(pairs) / ranks),
            "batch_size",
            f"at most `train_pairs` / processes = {len(pairs)} / {ranks}",
            self.batch_size,
        )
        return self._loader(pairs, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.dataset("val"))

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(_Images(self.dataset("test").images))

    def ood_dataloader(self) -> DataLoader[Tensor]:
        """Return images out of domain: the test images with their pixels in another order.

        One order for all of them, of ``seed``. They have the grey values of the test images and
        nothing to be read, see :class:`~lightning_flatmtl.callbacks.Calibration`.
        """
        images = self.dataset("test").images
        order = torch.randperm(images[0].numel(), generator=self.generator("ood"))
        return self._loader(_Images(images.flatten(1)[:, order].view_as(images)))

    def generator(self, purpose: str) -> torch.Generator:
        """Give every purpose its own stream, so that more noise does not mean other pairs."""
        words = np.random.SeedSequence([self.seed, STREAMS.index(purpose)]).generate_state(
            1, np.uint64
        )
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def _loader(
        self, dataset: InMemory[T], shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[T]:
        return loader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )


class _Images(InMemory[Tensor]):
    """Images without labels, for prediction."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @override
    def batch(self, rows: Tensor) -> Tensor:
        return floats(self.images[rows])


def floats(images: Tensor) -> Tensor:
    """Grey values in [0, 1]; uint8 is a quarter of the memory while they wait."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
