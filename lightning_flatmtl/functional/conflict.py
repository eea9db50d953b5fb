"""How much the gradients of the tasks point against each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import to_tensor, unit_gram


def cosine_similarity(gram: Tensor) -> Tensor:
    r"""Cosines :math:`K_{ij} / \sqrt{K_{ii} K_{jj}}` between the gradients.

    A zero row has cosine 0 with every row, itself included.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.

    Returns:
        Cosines ``[m, m]`` in ``[-1, 1]``, float64 on the CPU.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> cosine_similarity(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]], dtype=torch.float64)
    """
    cosines, _ = unit_gram(gram).padded()
    return to_tensor(cosines)


def conflict_rate(gram: Tensor) -> Tensor:
    r"""Share of task pairs whose gradients have a negative inner product.

    For two tasks it is 0 or 1, and its average over mini-batches is the conflict percentage of
    Phan et al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_. A zero row conflicts with
    nothing, and a single task has rate 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.

    Returns:
        A scalar in ``[0, 1]``, float64 on the CPU.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> conflict_rate(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor(1., dtype=torch.float64)
    """
    unit = unit_gram(gram)
    negative = np.count_nonzero(np.triu(unit.cosines, 1) < 0)
    pairs = unit.size * (unit.size - 1) // 2
    return torch.tensor(negative / max(pairs, 1), dtype=torch.float64)
