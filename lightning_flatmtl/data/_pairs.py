"""Two single images in one, a task for each: what MultiDigits and MultiMNIST have in common."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._in_memory import InMemory
from lightning_flatmtl.data._splits import Split, SplitModule

__all__ = ["TASKS", "ImagePairs", "PairModule"]

Batch = tuple[Tensor, dict[str, Tensor]]
P = TypeVar("P", bound="ImagePairs")

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


class PairModule(SplitModule[P]):
    """Splits and random streams of pairs; a subclass composes them.

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
        super().__init__(batch_size, num_workers, pin_memory)
        for split, count in pairs.items():
            check(count >= 1, f"{split}_pairs", "at least 1", count)
        most = f"at most `train_pairs` = {pairs['train']}"
        check(batch_size <= pairs["train"], "batch_size", most, batch_size)
        check(seed >= 0, "seed", "at least 0", seed)
        self.pairs, self.seed = pairs, seed

    def ood_dataloader(self) -> DataLoader[Tensor]:
        """Return images out of domain: the test images with their pixels in another order.

        One order for all of them, of ``seed``. They have the grey values of the test images and
        nothing to be read, see :class:`~lightning_flatmtl.callbacks.Calibration`.
        """
        pairs = self.dataset("test")
        order = torch.randperm(pairs.images[0].numel(), generator=self.generator("ood"))
        return self.loader(_Shuffled(pairs, order))

    def generator(self, purpose: str) -> torch.Generator:
        """Give every purpose its own stream, so that more noise does not mean other pairs."""
        words = np.random.SeedSequence([self.seed, STREAMS.index(purpose)]).generate_state(
            1, np.uint64
        )
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class _Shuffled(InMemory[Tensor]):
    """Images with their pixels in another order, without labels."""

    def __init__(self, pairs: ImagePairs, order: Tensor) -> None:
        self.pairs, self.order = pairs, order

    def __len__(self) -> int:
        return len(self.pairs)

    @override
    def batch(self, rows: Tensor) -> Tensor:
        images, _ = self.pairs.batch(rows)
        return images.flatten(1)[:, self.order].view_as(images)


def floats(images: Tensor) -> Tensor:
    """Grey values in [0, 1]; uint8 is a quarter of the memory while they wait."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
