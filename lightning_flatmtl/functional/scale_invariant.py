"""The sum of the logarithms of the losses."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, positive_losses


def scale_invariant_weights(losses: Vector) -> Tensor:
    r"""Weights of the losses in the gradient of the sum of their logarithms (SI).

    .. math:: w_i = \frac{\partial}{\partial L_i} \sum_j \log L_j = \frac{1}{L_i}

    A baseline of Navon et al., 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_.

    Args:
        losses: L, ``[m]``, positive; those below 1e-300 count as that.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``losses`` is not as described.

    Example:
        >>> import torch
        >>> scale_invariant_weights(torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500], dtype=torch.float64)
    """
    return 1.0 / positive_losses(losses)
