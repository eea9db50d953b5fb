"""Gradients of one length."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, to_tensor
from lightning_flatmtl.functional._vectors import Vector, task_vector


def db_mtl_weights(gram: Tensor, factors: Vector | None = None) -> Tensor:
    r"""Weights of the sum of the gradients, all brought to the largest norm (DB-MTL).

    .. math:: d = \max_j \lVert h_j \rVert \sum_i \frac{h_i}{\lVert h_i \rVert}, \qquad
        h_i = c_i g_i

    Lin et al., 2023, `arXiv:2308.12029 <https://arxiv.org/abs/2308.12029>`_, with
    :math:`c_i = 1 / L_i`, which makes :math:`h_i` the gradient of the loss's logarithm. A row of
    zeros has no direction and gets weight 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        factors: c, ``[m]``, each in ``[0, inf)``; all ones by default.

    Returns:
        Weights ``[m]`` of the :math:`g_i`, float64 on the CPU.

    Raises:
        ValueError: If ``factors`` is not as described, or if ``gram`` is not square, not finite,
            or has a negative diagonal.

    Example:
        >>> import torch
        >>> db_mtl_weights(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        tensor([1., 3.], dtype=torch.float64)
    """
    norms = to_tensor(gram_array(gram)).diagonal().sqrt()
    scale = torch.ones(len(norms)) if factors is None else factors
    scale = task_vector("factors", scale, len(norms), "[0, inf)")
    norms = norms * scale
    return scale * torch.where(norms > 0, norms.max() / norms, 0.0)
