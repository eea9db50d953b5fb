"""Data that lies in memory, handed out a batch at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

__all__ = ["InMemory", "loader"]

B = TypeVar("B")


class InMemory(Dataset[B], Generic[B]):
    """A data set whose batches are cut out of whole tensors: no loop over samples, no collating.

    A subclass says what rows a batch consists of, in :meth:`batch`. A DataLoader of torch asks for
    a batch through ``__getitems__``, with Lightning's samplers as well.
    """

    @abstractmethod
    def batch(self, rows: Tensor) -> B:
        """The samples of the rows, int64 ``[batch]``."""

    def __getitems__(self, indices: Sequence[int]) -> B:
        return self.batch(torch.as_tensor(indices, dtype=torch.int64))

    @override
    def __getitem__(self, index: int) -> B:
        sample: B = first(self.batch(torch.tensor([range(len(self))[index]])))
        return sample

    @abstractmethod
    def __len__(self) -> int: ...


def loader(
    dataset: InMemory[B],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[B]:
    """A loader that takes batches as the data set cuts them."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=as_it_is,
    )


def as_it_is(batch: B) -> B:
    """Collate nothing: what comes is a batch already."""
    return batch


def first(batch: Any) -> Any:
    """The only sample of a batch of one, in the same structure."""
    if isinstance(batch, Tensor):
        return batch[0]
    if isinstance(batch, dict):
        return {name: first(part) for name, part in batch.items()}
    return tuple(first(part) for part in batch)
