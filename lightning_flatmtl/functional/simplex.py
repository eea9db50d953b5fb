"""The point of the simplex nearest to a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, task_vector


def project_on_simplex(values: Vector) -> Tensor:
    r"""The point of the simplex that is nearest to a vector.

    .. math:: \operatorname*{arg\,min}_{w \ge 0,\; \mathbf 1^\top w = 1} \lVert w - v \rVert^2
        = \max(v - \theta, 0)

    with the one :math:`\theta` that makes the sum 1, found from the sorted entries.

    Args:
        values: v, ``[m]``, finite.

    Returns:
        ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``values`` is not as described.

    Example:
        >>> import torch
        >>> project_on_simplex(torch.tensor([0.5, 1.5, -3.0]))
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    given = task_vector("values", values)
    # Only differences count, and an entry that lies 1 below the highest gets nothing.
    shifted = (given - given.max()).clamp(min=-2.0)
    ordered = shifted.sort(descending=True).values
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    levels = (ordered.cumsum(0) - 1) / counts
    level = levels[int((ordered > levels).sum()) - 1]
    weights = (shifted - level).clamp(min=0.0)
    return weights / weights.sum()
