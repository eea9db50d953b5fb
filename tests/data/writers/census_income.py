"""Census-Income in the format of its files, a few rows."""

import gzip
from pathlib import Path

import numpy as np

from lightning_flatmtl.data._census_files import COLUMNS, NUMERIC
from lightning_flatmtl.data.census_income import CensusIncome

INCOMES = ("- 50000.", "50000+.")
MARITAL = ("Never married", "Divorced", "Married-civilian spouse present")
SIZES = dict(zip(CensusIncome.CATEGORICAL, CensusIncome.CARDINALITIES, strict=True))


def rows(count: int, seed: int = 0) -> list[list[str]]:
    """Rows of 42 values, every label in each half of them."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        row = {}
        for name in COLUMNS:
            if name in NUMERIC:
                row[name] = str(rng.integers(0, 90))
            elif name in SIZES:
                row[name] = f"{name} {rng.integers(0, SIZES[name] - 1)}"
        row["race"] = row["race"].replace("race 0", "?")
        row["marital status"] = MARITAL[number % 3]
        row["instance weight"] = f"{rng.uniform(100, 9000):.2f}"
        row["income"] = INCOMES[number % 2]
        found.append([row[name] for name in COLUMNS])
    return found


def write(path: Path, found: list[list[str]]) -> None:
    """Write rows as UCI does: a comma and a blank between values, a point after the last."""
    text = "".join(", ".join(row) + "\n" for row in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_census_income(root: Path, train: int = 60, test: int = 30) -> Path:
    """Write both files under ``root/census_income``, and return ``root``."""
    folder = root / "census_income"
    write(folder / "census-income.data", rows(train))
    write(folder / "census-income.test", rows(test, seed=1))
    return root
