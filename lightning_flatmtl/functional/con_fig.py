"""Conflict-free inverse gradients."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import Array, rounding, to_tensor, unit_gram
from lightning_flatmtl.functional.imtl import eigenpairs, solve_ones


def config_weights(gram: Tensor) -> Tensor:
    r"""Weights of the conflict-free inverse gradient (ConFIG).

    With the unit gradients :math:`U`, the unit vector :math:`u \propto U^+ \mathbf 1` and

    .. math:: d = \Big(\sum_i \langle g_i, u \rangle\Big)\, u

    Liu et al., 2024, `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_. For independent rows
    it lies on the line of :func:`imtl_g_weights`, with another length.

    Degenerate inputs: zero rows are left out (weight 0). For linearly dependent rows the
    pseudo-inverse gives the shortest vector whose projections are nearest to equal, whatever their
    order; for an exactly opposed pair alone, or wherever it is zero, the direction is zero.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.

    Returns:
        Weights ``[m]``, float64 on the CPU; they may be negative.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> config_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([2.0000, 0.6667], dtype=torch.float64)
    """
    unit = unit_gram(gram)
    if len(unit.rows) == 0:
        return to_tensor(np.zeros(unit.size))
    y = _pseudo_inverse_of_ones(unit.cosines)
    projections = unit.cosines @ y
    square = float(y @ projections)
    if square <= 0:  # no direction has projections that are equal at all
        return to_tensor(np.zeros(unit.size))
    length = math.sqrt(square)
    total = float(unit.norms @ projections) / length
    return to_tensor(unit.weights(y * (total / length)))


def _pseudo_inverse_of_ones(cosines: Array) -> Array:
    """The shortest ``y`` for which ``cosines y`` is nearest to 1; zeros where that is no help."""
    y = solve_ones(cosines)
    if y is not None:
        return y
    values, vectors, kernel = eigenpairs(cosines)
    vectors, values = vectors[:, ~kernel], values[~kernel]
    parts = vectors.sum(axis=0)
    # Sums of entries that cancel are the rounding error of the eigenvectors, which is that of
    # the matrix over the distance to the other eigenvalues.
    parts[np.abs(parts) <= len(cosines) * rounding(len(cosines)) * values[-1] / values] = 0.0
    part: Array = vectors @ (parts / values)
    return part
