"""The preference among tasks that a solver is given, checked."""

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import Array

__all__ = ["shares_of"]


def shares_of(preference: Tensor | None, size: int) -> Array:
    """Weights ``[m]`` of the tasks; without a preference 1/m each.

    Raises:
        ValueError: If they are not ``[m]``, or one is negative, NaN or infinite.
    """
    if preference is None:
        return np.full(size, 1.0 / size)
    if preference.shape != (size,):
        raise ValueError(f"`preference` must have shape [{size}], got {list(preference.shape)}.")
    shares: Array = preference.detach().to("cpu", torch.float64).numpy()
    wrong = ~(np.isfinite(shares) & (shares >= 0))
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"`preference` must be in [0, inf), got {shares[index]} at {index}.")
    return shares
