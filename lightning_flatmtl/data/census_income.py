"""Census-Income (KDD): two yes-or-no questions about 300,000 persons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.data._census_files import (
    CATEGORICAL,
    NUMERIC,
    Column,
    read_columns,
    unreadable,
)
from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._in_memory import InMemory
from lightning_flatmtl.data._splits import Split, SplitModule

__all__ = ["CensusIncome", "CensusRows"]

Inputs = dict[str, Tensor]
Batch = tuple[Inputs, dict[str, Tensor]]

# How many values census-income.names lists of each categorical column.
_DOCUMENTED = (
    9, 52, 47, 17, 3, 24, 15, 5, 10, 2, 3, 6, 8, 6, 6, 51, 38, 8, 10, 9, 10, 3, 4, 5, 43, 43, 43,
    5, 3, 3, 3, 2,
)  # fmt: skip
_INCOMES = {"- 50000": 0.0, "50000+": 1.0}
_NEVER_MARRIED = "Never married"


class CensusRows(InMemory[Batch]):
    """Persons of Census-Income, encoded.

    Item ``i`` is ``({"numeric": ..., "categorical": ...}, {"income": ..., "never_married": ...})``.

    Attributes:
        numeric: Standardised numbers, float32 ``[rows, 7]``.
        categorical: Indices of categories, int64 ``[rows, 32]``.
        targets: Labels 0 or 1 by task, float32 ``[rows]``.
    """

    def __init__(self, numeric: Tensor, categorical: Tensor, targets: dict[str, Tensor]) -> None:
        self.numeric, self.categorical, self.targets = numeric, categorical, targets

    @override
    def batch(self, rows: Tensor) -> Batch:
        # Whole rows at a time: several times as fast as indexing.
        inputs = {
            "numeric": self.numeric.index_select(0, rows),
            "categorical": self.categorical.index_select(0, rows),
        }
        return inputs, {task: labels.index_select(0, rows) for task, labels in self.targets.items()}

    @override
    def __len__(self) -> int:
        return len(self.numeric)


class CensusIncome(SplitModule[CensusRows]):
    r"""Does a person earn more than 50,000 dollars, and was he or she never married?

    `Census-Income (KDD) <https://archive.ics.uci.edu/dataset/117/census+income+kdd>`_: 199,523
    persons for training and 99,762 for testing from the surveys of 1994 and 1995, with 40
    attributes each. Tasks ``income`` and ``never_married`` as in the multi-task benchmark of MMoE
    (`Ma et al., 2018 <https://doi.org/10.1145/3219819.3220007>`_). The marital status, which
    is a label, and the instance weight are no features: 7 numeric and 32 categorical columns are
    left, :attr:`NUMERIC` and :attr:`CATEGORICAL`.

    The official test file is the test data; the validation rows are drawn from the training file.
    Numbers are standardised to mean 0 and variance 1, and categories numbered from 1 in the order
    of the alphabet, both by the training rows alone, without the validation rows. A category that
    those do not have is 0.

    A batch is ``(inputs, {"income": labels, "never_married": labels})``, inputs
    ``{"numeric": float32 [batch, 7], "categorical": int64 [batch, 32]}``, labels float32
    ``[batch]``, 0 or 1. The prediction loader yields inputs alone. The last, incomplete training
    batch is left out. The order of the training batches comes from torch's global generator.

    Args:
        root: Folder that has ``census_income`` in it, or the files themselves, gzipped or not:
            ``census-income.data`` and ``census-income.test`` of UCI, or the same rows named
            ``census_income_1994_1995_train.csv`` and ``census_income_1994_1995_test.csv``.
        batch_size: Rows in a batch (per process), at least 1.
        val_fraction: Share of the training file that is kept for validation, in (0, 1).
        seed: Seed of that choice, at least 0; not of shuffling.
        num_workers: Worker processes of every loader, at least 0. The data lies in memory, so 0
            is usually the fastest.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Attributes:
        categories: After ``setup``, the known values of each categorical column, whose indices
            begin at 1.
        mean: After ``setup``, means of the numeric columns of the training rows, float64 ``[7]``.
        std: After ``setup``, their standard deviations, 1 for a constant column.
        source_rows: After ``setup``, the rows of the training file that ``"train"`` and ``"val"``
            consist of, sorted int64.

    Raises:
        FileNotFoundError: In ``setup``, if a file is not there; it says where to get it.
        ValueError: If an argument is out of its bounds or, in ``setup``, a file is something else.
    """

    NUMERIC: ClassVar[tuple[str, ...]] = NUMERIC
    """Names of the numeric columns, in the order of the inputs."""

    CATEGORICAL: ClassVar[tuple[str, ...]] = CATEGORICAL
    """Names of the categorical columns, in the order of the inputs."""

    CARDINALITIES: ClassVar[tuple[int, ...]] = tuple(count + 1 for count in _DOCUMENTED)
    """Sizes of the tables of the categorical columns: the documented values, and 0 for others."""

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 1024,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory)
        check(0 < val_fraction < 1, "val_fraction", "in (0, 1)", val_fraction)
        check(seed >= 0, "seed", "at least 0", seed)
        self.root, self.val_fraction, self.seed = Path(root), val_fraction, seed
        self.categories: dict[str, tuple[str, ...]] = {}
        self.mean = self.std = torch.empty(0, dtype=torch.float64)
        self.source_rows: dict[Split, Tensor] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read both files, split and encode; a second call, whatever its stage, changes nothing."""
        if self._datasets:
            return
        known, test = read_columns(self.root, "train"), read_columns(self.root, "test")
        train_rows, val_rows = self._split(len(known["age"].codes))
        self._fit(known, train_rows)
        of_train_file, of_test_file = self._encoded(known), self._encoded(test)
        self.source_rows = {"train": train_rows, "val": val_rows}
        self._datasets = {
            "train": _part(of_train_file, train_rows),
            "val": _part(of_train_file, val_rows),
            "test": of_test_file,
        }

    def _split(self, rows: int) -> tuple[Tensor, Tensor]:
        """Deal the rows of the training file out to training and validation."""
        val = round(self.val_fraction * rows)
        if not 1 <= val < rows:
            raise ValueError(
                "`val_fraction` must leave training and validation a row each, got "
                f"{self.val_fraction} of {rows} rows."
            )
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
        return order[val:].sort().values, order[:val].sort().values

    def _fit(self, columns: dict[str, Column], rows: Tensor) -> None:
        """Learn from the training rows what numbers and categories look like."""
        numbers = self._numbers(columns)[rows]
        self.mean = numbers.mean(0)
        std = numbers.std(0, correction=0)
        self.std = torch.where(std > 0, std, 1.0)
        for name, size in zip(CATEGORICAL, self.CARDINALITIES, strict=True):
            seen = np.unique(columns[name].codes[rows.numpy()])
            if len(seen) >= size:
                raise unreadable(
                    self.root,
                    f"column '{name}' of the training file has {len(seen)} different values, where "
                    f"{size - 1} are documented",
                )
            self.categories[name] = tuple(sorted(columns[name].values[k] for k in seen))

    def _encoded(self, columns: dict[str, Column]) -> CensusRows:
        numeric = ((self._numbers(columns) - self.mean) / self.std).float()
        categorical = torch.stack(
            [self._indices(name, columns[name]) for name in CATEGORICAL], dim=1
        )
        marital = columns["marital status"]
        if _NEVER_MARRIED not in marital.values:
            raise unreadable(
                self.root, f"nobody's marital status is '{_NEVER_MARRIED}', but {marital.values}"
            )
        never = [float(value == _NEVER_MARRIED) for value in marital.values]
        targets = {
            "income": self._incomes(columns["income"]),
            "never_married": torch.tensor(never)[marital.codes],
        }
        return CensusRows(numeric, categorical, targets)

    def _indices(self, name: str, column: Column) -> Tensor:
        known = {value: index for index, value in enumerate(self.categories[name], 1)}
        return torch.tensor([known.get(value, 0) for value in column.values])[column.codes]

    def _numbers(self, columns: dict[str, Column]) -> Tensor:
        """The numeric columns as they are, float64 ``[rows, 7]``."""
        found = []
        for name in NUMERIC:
            values = []
            for value in columns[name].values:
                try:
                    values.append(float(value))
                except ValueError:
                    values.append(math.nan)
                if not math.isfinite(values[-1]):
                    raise unreadable(self.root, f"column '{name}' must hold numbers, got '{value}'")
            found.append(torch.tensor(values, dtype=torch.float64)[columns[name].codes])
        return torch.stack(found, dim=1)

    def _incomes(self, column: Column) -> Tensor:
        values = [value.rstrip(". ") for value in column.values]
        for value in values:
            if value not in _INCOMES:
                raise unreadable(
                    self.root, f"the last column must be '- 50000.' or '50000+.', got '{value}'"
                )
        return torch.tensor([_INCOMES[value] for value in values])[column.codes]


def _part(rows: CensusRows, chosen: Tensor) -> CensusRows:
    targets = {task: labels[chosen] for task, labels in rows.targets.items()}
    return CensusRows(rows.numeric[chosen], rows.categorical[chosen], targets)
