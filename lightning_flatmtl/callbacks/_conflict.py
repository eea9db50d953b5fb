"""How much task gradients conflict, by the names that it is logged under."""

from itertools import combinations

import torch
from torch import Tensor

from lightning_flatmtl.functional import conflict_rate, cosine_similarity

__all__ = ["between", "within"]


def within(prefix: str, tasks: tuple[str, ...], gram: Tensor) -> dict[str, float]:
    """Rate and cosines among the rows of one matrix.

    Args:
        prefix: What the names begin with.
        tasks: The names of the rows.
        gram: Their Gram matrix ``[m, m]``.
    """
    cosines = cosine_similarity(gram).tolist()
    pairs = {
        f"{prefix}/cosine/{a}/{b}": cosines[i][j]
        for (i, a), (j, b) in combinations(enumerate(tasks), 2)
    }
    return _summed_up(prefix, conflict_rate(gram).item(), pairs)


def between(
    prefix: str, tasks: tuple[str, ...], gram: Tensor, flat_gram: Tensor, cross_gram: Tensor
) -> dict[str, float]:
    """Rate and cosines of the loss part of each task with the flat part of each, its own too.

    Args:
        prefix: What the names begin with.
        tasks: The names of the rows.
        gram: Gram matrix of the loss parts ``[m, m]``.
        flat_gram: That of the flat parts ``[m, m]``.
        cross_gram: Inner products of loss parts (rows) and flat parts (columns).
    """
    m = len(tasks)
    both = torch.cat([torch.cat([gram, cross_gram], 1), torch.cat([cross_gram.T, flat_gram], 1)])
    cosines = cosine_similarity(both)[:m, m:]
    pairs = {
        f"{prefix}/cosine/{a}/{b}": cosines[i, j].item()
        for i, a in enumerate(tasks)
        for j, b in enumerate(tasks)
    }
    return _summed_up(prefix, (cosines < 0).double().mean().item(), pairs)


def _summed_up(prefix: str, rate: float, pairs: dict[str, float]) -> dict[str, float]:
    found = {f"{prefix}/rate": rate}
    if pairs:  # a single task has none
        found[f"{prefix}/mean_cosine"] = sum(pairs.values()) / len(pairs)
    return {**found, **pairs}
