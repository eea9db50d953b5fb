"""A table of rows, as CSV, as a data frame, and as a notebook shows it."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

__all__ = ["Row", "Rows"]

Row = dict[str, Any]


class Rows(Sequence[Row], ABC):
    """A table; each row is a mapping.

    Args:
        rows: The rows.
        markdown: What a notebook shows.
        remarks: What else is to be said.
    """

    def __init__(self, rows: Sequence[Row], markdown: str, remarks: Sequence[str]) -> None:
        self._rows = list(rows)
        self.markdown = markdown
        self.remarks = tuple(remarks)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The names of all columns."""

    def to_csv(self) -> str:
        """The rows as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in self)
        return text.getvalue()

    def to_pandas(self) -> Any:
        """The rows as a data frame.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415 # optional
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "pandas is not installed: run `pip install pandas`, or use the rows as they are."
            ) from None
        return pandas.DataFrame(self._rows, columns=self.columns)

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.markdown
