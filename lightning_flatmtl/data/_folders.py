"""Errors of data sets that are not where they should be."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

__all__ = ["broken", "missing"]


def missing(
    what: str, root: Path | str, found: str, layout: str, sources: str
) -> FileNotFoundError:
    """The error of a data set that is not there.

    Args:
        what: The data set and the argument, such as "NYUv2 (`root`)".
        root: The folder that was given.
        found: What is wrong: "the folder does not exist", "`train/label` is missing".
        layout: How the folder must look, a line per file or folder.
        sources: Where to get what, a line per source, official ones first.
    """
    return FileNotFoundError(_told(what, root, found, layout, sources))


def broken(what: str, root: Path | str, found: str, layout: str, sources: str) -> ValueError:
    """The error of files that are not what they should be; arguments as for a missing one."""
    return ValueError(_told(what, root, found, layout, sources))


def _told(what: str, root: Path | str, found: str, layout: str, sources: str) -> str:
    return (
        f"{what}: '{root}' cannot be read: {found}.\n"
        f"The folder must look like this:\n{indent(layout.strip(), '  ')}\n"
        f"Where to get it:\n{indent(sources.strip(), '  ')}"
    )
