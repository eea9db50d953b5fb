"""Data that lies in memory, handed out a batch at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

__all__ = ["Batches", "InMemory", "InputsAlone", "as_it_is"]

B = TypeVar("B")


class InMemory(Dataset[B], Generic[B]):
    """A data set whose batches can be cut out of whole tensors, see :class:`Batches`.

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


class InputsAlone(InMemory[Any]):
    """The inputs of samples ``(inputs, targets)``, for prediction.

    Args:
        dataset: The samples.
    """

    def __init__(self, dataset: InMemory[Any]) -> None:
        self.dataset = dataset

    @override
    def batch(self, rows: Tensor) -> Any:
        return self.dataset.batch(rows)[0]

    @override
    def __len__(self) -> int:
        return len(self.dataset)


class Batches(Dataset[B], Generic[B]):
    """What torch's DataLoader asks for a whole batch at once: no loop over samples, no collating.

    The batches are the same, and samplers, Lightning's too, work as ever: they say which rows make
    a batch.

    Args:
        dataset: Whose batches these are.
    """

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


def as_it_is(batch: B) -> B:
    """Collate nothing: what comes is a batch."""
    return batch


def _only(batch: Any) -> Any:
    """The only sample of a batch of one, in the same structure."""
    if isinstance(batch, Tensor):
        return batch[0]
    if isinstance(batch, dict):
        return {name: _only(part) for name, part in batch.items()}
    return tuple(_only(part) for part in batch)
