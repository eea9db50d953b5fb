"""Conflict-averse gradient descent."""

import math
from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import cagrad_weights

__all__ = ["CAGrad"]


@final
class CAGrad(GramAggregator):
    r"""Conflict-averse gradient descent (Liu et al., 2021).

    `arXiv:2110.14048 <https://arxiv.org/abs/2110.14048>`_: the direction in a ball
    around the mean gradient :math:`g_0` that serves the worst task best,
    :math:`\max_d \min_i \langle g_i, d \rangle` subject to
    :math:`\lVert d - g_0 \rVert \le c \lVert g_0 \rVert`, which is

    .. math:: d = g_0 + \frac{c \lVert g_0 \rVert}{\lVert g_w \rVert} g_w, \quad
        w = \arg\min_{w \in \Delta}
        \langle g_w, g_0 \rangle + c \lVert g_0 \rVert \lVert g_w \rVert.

    Solved exactly by an active set, where the published code runs SLSQP.

    If all :math:`g_i = g`, the direction is :math:`(1 + c) / (1 + c^2)\, g` (with ``rescale``).

    Args:
        c: Radius of the ball relative to the mean gradient, in ``[0, inf)``; 0 is the mean.
        rescale: Divide by :math:`1 + c^2`, as the published code does.

    Raises:
        ValueError: If ``c`` is out of its bounds.

    Example:
        >>> import torch
        >>> CAGrad(c=0.0)(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([1., 2.])
    """

    def __init__(self, c: float = 0.4, rescale: bool = True) -> None:
        if not 0 <= c < math.inf:
            raise ValueError(f"`c` must be in [0, inf), got {c}.")
        self.c = c
        self.rescale = rescale

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return cagrad_weights(gram, self.c, rescale=self.rescale)
