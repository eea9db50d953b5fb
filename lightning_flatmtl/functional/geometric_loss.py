"""The geometric mean of the losses."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, positive_losses


def gls_weights(losses: Vector) -> Tensor:
    r"""Weights of the losses in the gradient of their geometric mean (GLS).

    .. math:: w_i = \frac{\partial}{\partial L_i} \Bigl(\prod_j L_j\Bigr)^{1/m}
        = \frac{1}{m L_i} \Bigl(\prod_j L_j\Bigr)^{1/m}

    Chennupati et al., 2019, `arXiv:1904.08492 <https://arxiv.org/abs/1904.08492>`_.

    Args:
        losses: L, ``[m]``, positive; those below 1e-300 count as that.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``losses`` is not as described.

    Example:
        >>> import torch
        >>> gls_weights(torch.tensor([1.0, 4.0]))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    values = positive_losses(losses)
    return values.log().mean().exp() / (len(values) * values)
