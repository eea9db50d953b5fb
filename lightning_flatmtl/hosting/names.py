"""Names that a person has written, beside those that they may have meant."""

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: object, known: Iterable[str]) -> str:
    """``"Did you mean 'depth'? "``, or nothing where no known name is close.

    Example:
        >>> nearest("depht", ["depth", "normals"])
        "Did you mean 'depth'? "
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean '{close[0]}'? " if close else ""
