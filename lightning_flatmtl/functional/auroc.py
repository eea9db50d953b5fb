"""The area under the ROC curve, by counting pairs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["auroc"]


def auroc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the ROC curve, exact (Mann and Whitney, 1947).

    .. math::
        \frac{1}{|P|\,|N|} \sum_{p \in P} \sum_{n \in N}
        \big(1[s_p > s_n] + \tfrac{1}{2}\, 1[s_p = s_n]\big)

    the share of pairs of a positive and a negative sample in which the positive one has the higher
    score; ties count half. Pairs are counted in integers after sorting, so any scores will do,
    probabilities or logits, and scale, shift and order of the samples change nothing.

    Args:
        scores: What ranks the samples, ``[n]``.
        target: Labels, 1 where positive, ``[n]``.

    Returns:
        A scalar in [0, 1], float64; NaN without a positive or without a negative sample, and where
        a score is NaN.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    if scores.ndim != 1 or scores.shape != target.shape:
        raise ValueError(
            "`scores` and `target` must have the same shape [n], got "
            f"{list(scores.shape)} and {list(target.shape)}."
        )
    positive = scores[target == 1]
    negative = scores[target != 1].sort().values
    pairs = len(positive) * len(negative)
    if pairs == 0 or scores.isnan().any():
        return torch.full((), torch.nan, dtype=torch.float64, device=scores.device)
    below = torch.searchsorted(negative, positive).sum()
    not_above = torch.searchsorted(negative, positive, right=True).sum()
    return (below + not_above).double() / (2 * pairs)
