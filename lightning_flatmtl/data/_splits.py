"""What all data modules have in common: splits, and a loader for each."""

from __future__ import annotations

import math
from abc import ABC
from typing import Any, Generic, Literal, TypeVar, cast

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._in_memory import Batches, InMemory, InputsAlone, as_it_is

__all__ = ["SPLITS", "Split", "SplitModule"]

D = TypeVar("D", bound=Dataset[Any])
Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class SplitModule(pl.LightningDataModule, ABC, Generic[D]):
    """A loader for each split; a subclass puts the data sets into ``_datasets`` at setup.

    Training batches are shuffled, and the last, incomplete one is left out: every step then
    averages over equally many samples, and batch normalisation never meets a batch of one.

    Args:
        batch_size: Samples in a batch (per process), at least 1.
        num_workers: Worker processes of every loader, at least 0.
        pin_memory: Whether loaders copy batches to page-locked memory.
    """

    def __init__(self, batch_size: int, num_workers: int, pin_memory: bool) -> None:
        super().__init__()
        check(batch_size >= 1, "batch_size", "at least 1", batch_size)
        check(num_workers >= 0, "num_workers", "at least 0", num_workers)
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self._datasets: dict[Split, D] = {}

    def dataset(self, split: Split) -> D:
        """Return the data set of a split.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: If ``setup`` has not run.
        """
        if not self._datasets:
            raise RuntimeError("The data does not exist yet: call `setup()` first.")
        return self._datasets[split]

    def inputs(self) -> Dataset[Any]:
        """Return the test samples without their targets, for prediction."""
        return InputsAlone(cast("InMemory[Any]", self.dataset("test")))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        samples = self.dataset("train")
        count = len(samples)  # type: ignore[arg-type]
        ranks = self.trainer.world_size if self.trainer is not None else 1
        bound = f"at most training samples / processes = {count} / {ranks}"
        check(self.batch_size <= math.ceil(count / ranks), "batch_size", bound, self.batch_size)
        return self.loader(samples, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> Any:
        return self.loader(self.dataset("val"))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.inputs())

    def loader(
        self, dataset: Dataset[Any], shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """A loader with the settings of all; of data in memory it takes whole batches."""
        batches = Batches(dataset) if isinstance(dataset, InMemory) else None
        return DataLoader(
            dataset if batches is None else batches,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            collate_fn=None if batches is None else as_it_is,
        )
