"""The file of the Women's E-Commerce Clothing Reviews, read into reviews."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_flatmtl.data._folders import broken, missing

__all__ = ["COLUMNS", "DEPARTMENTS", "Review", "find_reviews", "read_reviews", "words_of"]

COLUMNS = (
    "", "Clothing ID", "Age", "Title", "Review Text", "Rating", "Recommended IND",
    "Positive Feedback Count", "Division Name", "Department Name", "Class Name",
)  # fmt: skip
DEPARTMENTS = ("Bottoms", "Dresses", "Intimate", "Jackets", "Tops", "Trend")

_NAMES = ("reviews.csv", "Womens Clothing E-Commerce Reviews.csv")
_SUBFOLDER = "reviews"

LAYOUT = """
reviews/
  reviews.csv   23,486 rows of 11 columns with a header, or under its published name
                Womens Clothing E-Commerce Reviews.csv
"""
SOURCES = """
Kaggle, "Women's E-Commerce Clothing Reviews" by nicapotato (CC0):
  https://www.kaggle.com/datasets/nicapotato/womens-ecommerce-clothing-reviews
"""

# A word with its apostrophes, a number, or a single mark.
_TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*|\d+|[^\w\s]")


class Review(NamedTuple):
    """One row of the file."""

    row: int
    product: str
    title: str
    text: str
    stars: int
    recommended: bool
    department: str | None


def words_of(text: str) -> list[str]:
    """Words, numbers and marks in their order, in small letters.

    Example:
        >>> words_of("I'm 5'4, it fits!")
        ["i'm", '5', "'", '4', ',', 'it', 'fits', '!']
    """
    return _TOKEN.findall(text.lower())


def find_reviews(root: str | Path) -> Path:
    """The file, in ``root/reviews`` or in ``root``.

    Raises:
        FileNotFoundError: If it is not there.
    """
    below = Path(root) / _SUBFOLDER
    folder = below if below.is_dir() else Path(root)
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = f"`{_NAMES[0]}` is missing" if folder.is_dir() else "the folder does not exist"
    raise missing("Clothing reviews (`root`)", folder, found, LAYOUT, SOURCES)


def read_reviews(path: Path) -> list[Review]:
    """All rows of the file.

    Raises:
        ValueError: If the file is something else; the message names the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(_reviews(path, csv.reader(file)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _broken(path, f"`{path.name}` is no text of rows ({error})") from error


def _reviews(path: Path, rows: Iterator[list[str]]) -> Iterator[Review]:
    header = next(rows, [])
    if tuple(header) != COLUMNS:
        begin = ",".join(header)[:60]
        raise _broken(
            path, f"`{path.name}` must begin with the header of the columns, not {begin!r}"
        )
    count = 0
    for count, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS):
            raise _broken(path, f"row {count} must have {len(COLUMNS)} columns, got {len(row)}")
        yield _review(path, count, dict(zip(COLUMNS, row, strict=True)))
    if not count:
        raise _broken(path, f"`{path.name}` has no rows")


def _review(path: Path, count: int, row: dict[str, str]) -> Review:
    stars, recommended, department = (
        row[name] for name in ("Rating", "Recommended IND", "Department Name")
    )
    for name, fits, bound in (
        ("Rating", stars in {"1", "2", "3", "4", "5"}, "1 to 5"),
        ("Recommended IND", recommended in {"0", "1"}, "0 or 1"),
        ("Department Name", department in {*DEPARTMENTS, ""}, f"empty or one of {DEPARTMENTS}"),
    ):
        if not fits:
            raise _broken(path, f"row {count}: '{name}' must be {bound}, got {row[name]!r}")
    return Review(
        row=count - 1,
        product=row["Clothing ID"],
        title=row["Title"].strip(),
        text=row["Review Text"].strip(),
        stars=int(stars),
        recommended=recommended == "1",
        department=department or None,
    )


def _broken(path: Path, found: str) -> ValueError:
    return broken("Clothing reviews (`root`)", path.parent, found, LAYOUT, SOURCES)
