"""Differentiating as plain training does: outside autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["outside_autocast"]


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast on ``device``.

    A backward pass takes the types of its forward pass. Under autocast a part of a model that has
    opted out of it would be differentiated in 16 bits all the same.

    Example:
        >>> cpu = torch.device("cpu")
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), outside_autocast(cpu):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
