"""The multiple-gradient descent algorithm, with normalised gradients."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, to_tensor
from lightning_flatmtl.functional._vectors import Vector, positive_losses
from lightning_flatmtl.functional.min_norm import min_norm_weights

Normalization = Literal["none", "l2", "loss", "loss+"]


def mgda_weights(
    gram: Tensor,
    normalization: Normalization = "none",
    losses: Vector | None = None,
) -> Tensor:
    r"""Weights of the min-norm point of the hull of the normalised gradients (MGDA).

    .. math:: w = \operatorname*{arg\,min}_{w \ge 0,\; \mathbf 1^\top w = 1}
        \Bigl\lVert \sum_i w_i g_i / n_i \Bigr\rVert^2

    Sener and Koltun, 2018, `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_, by
    :func:`min_norm_weights`. The weights are meant for the raw gradients.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        normalization: ``"none"`` (:math:`n_i = 1`), ``"l2"`` (:math:`\lVert g_i \rVert`),
            ``"loss"`` (:math:`L_i`) or ``"loss+"`` (:math:`L_i \lVert g_i \rVert`).
        losses: L, ``[m]``, positive, where they are used; those below 1e-300 count as that.

    Returns:
        Weights ``[m]``, float64 on the CPU, nonnegative with sum 1.

    Raises:
        ValueError: If ``normalization`` or ``losses`` is not as described, or if ``gram`` is not
            square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> K = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> mgda_weights(K, "loss", losses=torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"`normalization` must be one of {list(get_args(Normalization))}, got "
            f"{normalization!r}."
        )
    if normalization == "none":
        return min_norm_weights(gram)
    K = to_tensor(gram_array(gram))
    scale = torch.ones(len(K), dtype=torch.float64)
    if normalization in {"l2", "loss+"}:
        norms = K.diagonal().sqrt()
        scale = torch.where(norms > 0, norms, scale)  # a zero row stays zero
    if normalization in {"loss", "loss+"}:
        if losses is None:
            raise ValueError(f"`losses` must be given for {normalization!r}, got None.")
        scale = scale * positive_losses(losses, len(K))
    return min_norm_weights(K / scale[:, None] / scale[None, :])
