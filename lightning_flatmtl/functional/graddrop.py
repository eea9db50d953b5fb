"""One sign of the gradient in every coordinate."""

from __future__ import annotations

import torch
from torch import Tensor


def graddrop_direction(jacobian: Tensor, draws: Tensor, leak: float = 0.0) -> Tensor:
    r"""The sum of the gradients with one sign kept in every coordinate (GradDrop).

    With the purity :math:`P = \tfrac12 (1 + \sum_i g_i / \sum_i \lvert g_i \rvert)`, coordinate by
    coordinate:

    .. math:: d = \lambda \sum_i g_i + (1 - \lambda) \begin{cases}
        \sum_i \max(g_i, 0) & u < P \\ \sum_i \min(g_i, 0) & \text{else} \end{cases}

    Chen et al., 2020, `arXiv:2010.06808 <https://arxiv.org/abs/2010.06808>`_, Algorithm 1, lines
    10 to 15, on parameters. Coordinates in which all gradients agree are the plain sum.

    Args:
        jacobian: One row per task, ``[m, d]``, of a floating type.
        draws: u, ``[d]``, uniform random numbers in ``[0, 1)``, best of the type in which the sums
            are taken: that of ``jacobian``, at least float32.
        leak: :math:`\lambda`, in ``[0, 1]``; 1 is the plain sum.

    Returns:
        The direction ``[d]``, of the type and on the device of ``jacobian``.

    Raises:
        ValueError: If a shape is wrong, or ``leak`` is out of its bounds.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -1.0, 2.0], [3.0, -1.0, -2.0]])
        >>> graddrop_direction(rows, torch.tensor([0.9, 0.1, 0.6]))
        tensor([ 4., -2., -2.])
    """
    if jacobian.ndim != 2 or len(jacobian) == 0:
        raise ValueError(f"`jacobian` must have shape [m, d], got {list(jacobian.shape)}.")
    if draws.shape != jacobian.shape[1:]:
        expected = list(jacobian.shape[1:])
        raise ValueError(f"`draws` must have shape {expected}, got {list(draws.shape)}.")
    if not 0 <= leak <= 1:
        raise ValueError(f"`leak` must be in [0, 1], got {leak}.")
    wide = torch.promote_types(jacobian.dtype, torch.float32)
    positive = torch.zeros(jacobian.shape[1], dtype=wide, device=jacobian.device)
    negative = positive.clone()
    for row in jacobian.detach():  # row by row, so that no second matrix is needed
        positive += row.clamp(min=0)
        negative += row.clamp(max=0)
    # P = positive / (positive - negative), without a division by zero.
    kept = torch.where(draws * (positive - negative) < positive, positive, negative)
    direction = torch.lerp(kept, positive + negative, leak) if leak else kept
    return direction.to(jacobian.dtype)
