"""The door of every argument with one number per task: checks and conversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import refuse_unreadable

__all__ = ["LEAST_LOSS", "Vector", "positive_losses", "task_vector"]

Vector: TypeAlias = Tensor | Sequence[float]
"""One number per task; a sequence is a list or a tuple."""

Bounds: TypeAlias = Literal["(-inf, inf)", "[0, inf)", "(0, inf)"]

_INSIDE: dict[Bounds, Callable[[float], bool]] = {
    "(-inf, inf)": math.isfinite,
    "[0, inf)": lambda value: 0 <= value < math.inf,
    "(0, inf)": lambda value: 0 < value < math.inf,
}

LEAST_LOSS = 1e-300
"""Where float64 ends, so do the inverses of losses: those below count as this."""


def task_vector(
    name: str,
    values: Vector,
    size: int | None = None,
    bounds: Bounds = "(-inf, inf)",
) -> Tensor:
    """``values`` in float64 on the CPU.

    Raises:
        ValueError: If they are no dense tensor and no list, are not ``[size]`` (``[m]`` where it is
            not given), or one is out of ``bounds``.
    """
    if isinstance(values, list | tuple):
        values = torch.tensor(values, dtype=torch.float64)
    refuse_unreadable(name, values)
    assert isinstance(values, Tensor)
    if values.ndim != 1 or len(values) == 0 or size not in (None, len(values)):
        shape = "[m] with m >= 1" if size is None else f"[{size}]"
        raise ValueError(f"`{name}` must have shape {shape}, got {list(values.shape)}.")
    vector = values.detach().to("cpu", torch.float64)
    inside = _INSIDE[bounds]
    for index, value in enumerate(vector.tolist()):
        if not inside(value):
            raise ValueError(f"`{name}` must be in {bounds}, got {value} at {index}.")
    return vector


def positive_losses(losses: Vector, size: int | None = None, name: str = "losses") -> Tensor:
    """The losses as :func:`task_vector`, all so far above zero that they have an inverse.

    Raises:
        ValueError: As :func:`task_vector`, also if one is not positive.
    """
    return task_vector(name, losses, size, "(0, inf)").clamp(min=LEAST_LOSS)
