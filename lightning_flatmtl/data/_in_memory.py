"""Data that lies in memory, handed out a batch at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

__all__ = ["InMemory", "loader"]

B = TypeVar("B")


class InMemory(Dataset[B], Generic[B]):
    """A data set whose batches can be cut out of whole tensors, see :func:`loader`.

    A subclass says what a batch consists of, in :meth:`batch`. Item by item it is an ordinary
    map-style data set, which any DataLoader takes.
    """

    @abstractmethod
    def batch(self, rows: Tensor) -> B:
        """The samples of the rows, int64 ``[batch]``: a tensor, or a tuple or dict of such."""

    @abstractmethod
    def __len__(self) -> int: ...

    @override
    def __getitem__(self, index: int) -> B:
        row = range(len(self))[index]  # refuses what is out of range
        sample: B = _only(self.batch(torch.tensor([row])))
        return sample


def loader(
    dataset: InMemory[B],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[B]:
    """A loader without a loop over samples and without collating; its batches are the same.

    Samplers, Lightning's too, work as ever: they say which rows make a batch.
    """
    return DataLoader(
        _Batches(dataset),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=_as_it_is,
    )


class _Batches(Dataset[B], Generic[B]):
    """What torch's DataLoader asks for a whole batch at once."""

    def __init__(self, dataset: InMemory[B]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, index: int) -> B:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> B:
        # By way of NumPy: torch takes four times as long to read a list.
        return self.dataset.batch(torch.from_numpy(np.fromiter(indices, np.int64, len(indices))))


def _as_it_is(batch: B) -> B:
    return batch


def _only(batch: Any) -> Any:
    """The only sample of a batch of one, in the same structure."""
    if isinstance(batch, Tensor):
        return batch[0]
    if isinstance(batch, dict):
        return {name: _only(part) for name, part in batch.items()}
    return tuple(_only(part) for part in batch)
