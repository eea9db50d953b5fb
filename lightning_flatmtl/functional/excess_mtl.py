"""Estimates of the excess risk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExcessRisk(NamedTuple):
    """What :func:`excess_risk` returns.

    Attributes:
        risk: The estimate, one number for each gradient.
        roots: The roots of the sums of squared gradients, of the shape of the gradient; the sums
            themselves may leave float32.
    """

    risk: Tensor
    roots: Tensor


def excess_risk(gradient: Tensor, roots: Tensor | None = None) -> ExcessRisk:
    r"""How far a task is from what it could reach, estimated as in ExcessMTL.

    .. math:: e = \sum_k g_k^2 / \sqrt{h_k}, \qquad h_k \leftarrow h_k + g_k^2

    He et al., 2024, `arXiv:2402.02009 <https://arxiv.org/abs/2402.02009>`_: the weight of the
    task's loss is multiplied by :math:`\exp(\eta\, e / e_0)` with its first estimate
    :math:`e_0`, see :func:`softmax_weights`. A coordinate that has seen zeros only adds nothing.

    Args:
        gradient: g, ``[d]``, or the Jacobian of several tasks, ``[m, d]``.
        roots: :math:`\sqrt h` of the gradients so far, as returned; none by default.

    Returns:
        The estimate (``[]`` or ``[m]``, float64) and the new roots, on the device of ``gradient``;
        the roots at least in float32.

    Raises:
        ValueError: If ``roots`` has not the shape of ``gradient``.

    Example:
        >>> import torch
        >>> first = excess_risk(torch.tensor([3.0, 0.0]))
        >>> first.risk
        tensor(3., dtype=torch.float64)
        >>> excess_risk(torch.tensor([4.0, 0.0]), first.roots).risk
        tensor(3.2000, dtype=torch.float64)
    """
    size = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32)).abs()
    if roots is None:
        new = size
    elif roots.shape == size.shape:
        new = roots.to(size).hypot(size)
    else:
        raise ValueError(f"`roots` must have shape {list(size.shape)}, got {list(roots.shape)}.")
    share = torch.where(new > 0, size / new, 0.0)
    wide = torch.float32 if size.device.type == "mps" else torch.float64  # MPS has none wider
    return ExcessRisk((size.to(wide) * share).sum(dim=-1), new)
