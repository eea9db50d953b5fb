"""How each method is drawn, the same in every figure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from lightning_flatmtl.callbacks._pictures import COLOURS, MARKERS
from lightning_flatmtl.comparison.settings import SINGLE_TASK

__all__ = ["SINGLE_STYLE", "Style", "styles_of"]

_COLOURS = (*COLOURS, "#000000")
"""Yellow, the eighth of Okabe and Ito, is left out: a line of it is not seen on white."""

_PAPER = ("LS", "MGDA", "PCGrad", "CAGrad", "IMTL", "NashMTL")

_ARM_LINES = ((0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
_ARM_HATCHES = ("////", "....", "xxx", "----", "\\\\\\\\", "++")
_ARM_MARKERS = ("X", "*", "<", "p", ">", "h", "d")


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Args:
        family: What it is a variant of: ``CAGrad`` for ``F-CAGrad (direct)``.
        colour: That of the family.
        marker: That of the family too, another one for a further variant.
        line: A line style of matplotlib.
        hatch: What fills its bars beside the colour.
        filled: Whether markers are filled and bars have the full colour: flat methods.
    """

    family: str
    colour: str
    marker: str
    line: Any = "-"
    hatch: str = ""
    filled: bool = False


SINGLE_STYLE = Style(SINGLE_TASK, "#7F7F7F", "o", (0, (2, 2)))
"""The single-task runs are grey."""


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method, told from the names: ``F-X`` and ``X (arm)`` belong to ``X``.

    Colours repeat after seven families, with other markers.

    Args:
        methods: All methods of the comparison in their order, whether they are shown or not, so
            that a style does not depend on what is done.
    """
    order = _slots(list(dict.fromkeys(_families(methods).values())))
    found: dict[str, Style] = {SINGLE_TASK: SINGLE_STYLE}
    plain_and_flat: set[tuple[str, bool]] = set()
    arms = dict.fromkeys(order, 0)
    for method, family in _families(methods).items():
        flat = method.startswith("F-")
        index = order[family]
        colour, marker = _COLOURS[index % len(_COLOURS)], MARKERS[index % len(MARKERS)]
        if (family, flat) not in plain_and_flat and _bare(method) == family:
            plain_and_flat.add((family, flat))
            found[method] = Style(family, colour, marker, "--" if flat else "-", "", flat)
        else:
            arm, arms[family] = arms[family], arms[family] + 1
            line, hatch = _at(_ARM_LINES, arm), _at(_ARM_HATCHES, arm)
            found[method] = Style(family, colour, _at(_ARM_MARKERS, arm), line, hatch, flat)
    return found


def _slots(families: Sequence[str]) -> dict[str, int]:
    """A colour and marker for each: the same in every comparison for the methods of the paper."""
    slots = {family: _PAPER.index(family) for family in families if family in _PAPER}
    taken = set(slots.values())
    free = (index for index in count() if index not in taken)
    return slots | {family: next(free) for family in families if family not in _PAPER}


def _families(methods: Sequence[str]) -> dict[str, str]:
    """The family of each method."""
    bare = {_bare(method) for method in methods}
    return {method: _family(_bare(method), bare) for method in methods if method != SINGLE_TASK}


def _family(name: str, known: Iterable[str]) -> str:
    """``CAGrad`` for ``CAGrad (direct)``, and for ``CAGrad c=0.4`` where there is a ``CAGrad``."""
    before = re.split(r"\s*[(\[]", name, maxsplit=1)[0] or name
    within = [x for x in known if x and re.match(rf"{re.escape(x)}(?![A-Za-z0-9])", before)]
    return min([*within, before], key=len)


def _bare(method: str) -> str:
    return method.removeprefix("F-")


def _at(choices: Sequence[Any], index: int) -> Any:
    return choices[index % len(choices)]
