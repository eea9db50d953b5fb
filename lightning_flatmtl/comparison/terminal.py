"""The table of a comparison in a terminal: with styles instead of marks."""

import re
import sys

from lightning_flatmtl.comparison.live import is_live

__all__ = ["print_table"]

_BEST, _CLOSE = re.compile(r"^\*\*(.*)\*\*$"), re.compile(r"^<u>(.*)</u>$")


def print_table(markdown: str) -> None:
    """Print the table and the words below it; plainly where there is no terminal or no rich."""
    if not is_live():
        sys.stdout.write(f"\n{markdown}\n")
        return
    from rich.console import Console  # noqa: PLC0415 # optional
    from rich.table import Table  # noqa: PLC0415

    rows = [_cells(line) for line in markdown.splitlines() if line.startswith("|")]
    table = Table()
    for index, head in enumerate(rows[0]):
        table.add_column(head.replace("[", r"\["), justify="right" if index else "left")
    for row in rows[2:]:
        table.add_row(*map(_styled, row))
    console = Console()
    console.print(table)
    words = markdown.splitlines()[len(rows) :]
    console.print("\n".join(words).strip(), markup=False, highlight=False)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _styled(cell: str) -> str:
    return _CLOSE.sub(r"[underline]\1[/underline]", _BEST.sub(r"[bold]\1[/bold]", cell))
