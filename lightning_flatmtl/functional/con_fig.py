"""Conflict-free inverse gradients."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import rounding, to_tensor, unit_gram
from lightning_flatmtl.functional.imtl import equal_projections


def config_weights(gram: Tensor) -> Tensor:
    r"""Weights of the conflict-free inverse gradient (ConFIG).

    With the unit gradients :math:`U`, the unit vector :math:`u \propto U^+ \mathbf 1` and

    .. math:: d = \Big(\sum_i \langle g_i, u \rangle\Big)\, u

    Liu et al., 2024, `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_. The direction is that
    of :func:`imtl_g_weights`, the length is not.

    Degenerate inputs: zero rows are left out (weight 0). For linearly dependent rows :math:`u` is
    the limit of the regularised problem; an exactly opposed pair gets the zero direction.

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
    y = equal_projections(unit.cosines)
    projections = unit.cosines @ y
    square = float(y @ projections)
    # Below rounding error the vector is zero: no direction has equal projections.
    if square <= rounding(len(y)) * float(np.abs(y).sum()) ** 2:
        return to_tensor(np.zeros(unit.size))
    length = math.sqrt(square)
    total = float(unit.norms @ projections) / length
    return to_tensor(unit.weights(y * (total / length)))
