"""Direction-oriented multi-objective descent."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, is_number, to_tensor
from lightning_flatmtl.functional.min_norm import min_norm_weights


def sdmgrad_weights(gram: Tensor, lam: float = 0.3) -> Tensor:
    r"""Weights of a min-norm point that is drawn to the mean gradient (SDMGrad).

    .. math:: d = \frac{\sum_i w_i g_i + \lambda g_0}{1 + \lambda}, \qquad
        w = \operatorname*{arg\,min}_{w \ge 0,\; \mathbf 1^\top w = 1}
        \Bigl\lVert \sum_i w_i g_i + \lambda g_0 \Bigr\rVert^2

    with the mean gradient :math:`g_0`. Xiao et al., 2023, `arXiv:2305.18409
    <https://arxiv.org/abs/2305.18409>`_, who move :math:`w` by some stochastic steps; here it is
    exact, by :func:`min_norm_weights`.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        lam: Pull towards the mean gradient, in ``[0, inf)``; 0 is the min-norm point.

    Returns:
        Weights ``[m]`` of the direction, float64 on the CPU, nonnegative with sum 1.

    Raises:
        ValueError: If ``lam`` is out of bounds, or if ``gram`` is not square, not finite, or has
            a negative diagonal.

    Example:
        >>> import torch
        >>> sdmgrad_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), lam=1.0)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if not is_number(lam, 0, low_included=True):
        raise ValueError(f"`lam` must be in [0, inf), got {lam}.")
    K = to_tensor(gram_array(gram))
    m = len(K)
    # Since w sums to 1, the objective is the min-norm problem of the rows g_i + lam g_0.
    mix = torch.eye(m, dtype=torch.float64) + lam / m
    return (min_norm_weights(mix @ K @ mix.T) + lam / m) / (1 + lam)
