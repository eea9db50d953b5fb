"""The min-norm point of the convex hull of the gradients."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import Array, rounding, semidefinite_unit_gram, to_tensor
from lightning_flatmtl.functional._nonnegative import solve_nonnegative


def min_norm_weights(gram: Tensor) -> Tensor:
    r"""Weights of the min-norm point of the convex hull of the gradients (MGDA).

    .. math:: w = \operatorname*{arg\,min}_{w \ge 0,\; \mathbf 1^\top w = 1} w^\top K w

    Sener and Koltun, 2018, `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_, who approximate
    the point by Frank-Wolfe steps; here it is exact, found by an active-set method.

    Where rows depend on each other several weights give the same point, and one of them is
    returned. Zero rows share the weight equally: they are the min-norm point. If zero lies in the
    hull for another reason (exactly opposed rows, say) the direction is zero up to rounding.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.

    Returns:
        Weights ``[m]``, float64 on the CPU, nonnegative with sum 1.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    unit = semidefinite_unit_gram(gram)
    if len(unit.rows) < unit.size:
        weights = np.ones(unit.size)
        weights[unit.rows] = 0.0
        return to_tensor(weights / weights.sum())
    return to_tensor(unit.weights(min_norm_point(unit.norms, unit.cosines)))


def min_norm_point(norms: Array, cosines: Array) -> Array:
    """Weights of the unit rows that give the min-norm point; divided by ``norms`` they sum to 1."""
    # The ray through the hull's min-norm point is where the cone of the rows (g_i, s) comes
    # nearest to (0, 1): a problem without the sum constraint. The smallest norm as s keeps all
    # terms of order 1.
    shares = norms.min() / norms
    point = solve_nonnegative(cosines + shares[:, None] * shares, shares)
    scaled: Array = point * (norms.min() / (shares @ point))
    return scaled


def vanishes(unit_weights: Array, cosines: Array) -> bool:
    """Whether a nonnegative combination of unit rows is zero to within rounding."""
    squared = float(unit_weights @ cosines @ unit_weights)
    return squared <= rounding(len(cosines)) * float(unit_weights @ np.abs(cosines) @ unit_weights)
