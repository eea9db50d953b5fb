"""Gradients balanced by the trace of their neural tangent kernel."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, is_number, to_tensor


def ntkmtl_weights(gram: Tensor, exponent: float = 0.5) -> Tensor:
    r"""Weights that make all tasks converge equally fast by their tangent kernels (NTKMTL).

    .. math:: w_i = \left(\frac{\operatorname{tr} K}{K_{ii}}\right)^p

    Qin et al., 2025, `arXiv:2510.18258 <https://arxiv.org/abs/2510.18258>`_, for one block of
    samples a batch (:math:`n = 1`), where the tangent kernel of a task is the number
    :math:`K_{ii} = \lVert g_i \rVert^2`. A zero row has weight 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        exponent: p, in ``[0, inf)``; 0.5 makes all terms of the sum equally long, 0 is the sum.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``exponent`` is out of bounds, or if ``gram`` is not square, not finite, or
            has a negative diagonal.

    Example:
        >>> import torch
        >>> ntkmtl_weights(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor([1.6667, 1.2500], dtype=torch.float64)
    """
    if not is_number(exponent, 0, low_included=True):
        raise ValueError(f"`exponent` must be in [0, inf), got {exponent}.")
    norms = np.sqrt(gram_array(gram).diagonal())
    weights = np.zeros(len(norms))
    rows = norms > 0
    if rows.any():
        total = norms.max() * np.linalg.norm(norms / norms.max())
        weights[rows] = (total / norms[rows]) ** (2 * exponent)
    return to_tensor(weights)
