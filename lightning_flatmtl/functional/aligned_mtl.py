"""Aligned-MTL: gradients with balanced singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import Array, semidefinite_unit_gram, to_tensor
from lightning_flatmtl.functional._jacobi import gram_eigenpairs
from lightning_flatmtl.functional._shares import shares_of

Scale = Literal["min", "median", "rmse"]


def aligned_mtl_weights(
    gram: Tensor, scale: Scale = "min", preference: Tensor | Sequence[float] | None = None
) -> Tensor:
    r"""Weights of the mean of the aligned gradients (Aligned-MTL).

    With :math:`K = V \Lambda V^\top` over the nonzero eigenvalues, the aligned gradients have one
    common singular value :math:`\sigma`, and their mean is

    .. math:: w = \tfrac1m\, \sigma\, V \Lambda^{-1/2} V^\top \mathbf 1, \qquad
        \sigma^2 = \min, \operatorname{median} \text{ or mean of } \Lambda

    Senushkin et al., 2023, `arXiv:2305.19000 <https://arxiv.org/abs/2305.19000>`_. Of an even
    number of eigenvalues the lower median counts, as in the published code.

    Eigenvalues within rounding error of zero, judged against the norms of the rows and not
    against the largest eigenvalue, are dropped: dependent rows span fewer directions. Zero rows
    have weight 0, but count in m.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        scale: Which singular value all get: the smallest (``"min"``), the ``"median"``, or their
            root mean square (``"rmse"``).
        preference: Weights ``[m]`` of the aligned gradients, in place of 1/m, each in ``[0, inf)``.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``scale`` is unknown, ``preference`` is not as described, or ``gram`` is not
            square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> aligned_mtl_weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]))
        tensor([0.5000, 0.1250], dtype=torch.float64)
    """
    if scale not in get_args(Scale):
        raise ValueError(f'`scale` must be "min", "median" or "rmse", got {scale!r}.')
    unit = semidefinite_unit_gram(gram)
    shares = shares_of(preference, unit.size, otherwise=1 / unit.size)
    weights = np.zeros(unit.size)
    if len(unit.rows):
        values, vectors = gram_eigenpairs(unit)
        balance = np.sqrt(_common_value(values, scale) / values)
        weights[unit.rows] = vectors @ (balance * (shares[unit.rows] @ vectors))
    return to_tensor(weights)


def _common_value(values: Array, scale: Scale) -> float:
    if scale == "rmse":
        return float(values.mean())
    rank = 0 if scale == "min" else (len(values) - 1) // 2
    return float(np.sort(values)[rank])
