"""The joint prediction of several tasks, and how accuracy depends on what is abstained from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RiskCoverage", "area_under_risk", "most_likely_combinations", "risk_coverage"]


def most_likely_combinations(
    log_probabilities: Sequence[Tensor], count: int = 1
) -> tuple[Tensor, Tensor]:
    r"""The most likely combinations of independent choices.

    The probability of a combination is the product of its parts',
    :math:`\log p(y_1, \dots, y_F) = \sum_f \log p_f(y_f)`. The best combinations are built factor
    by factor: whatever is among the ``count`` best has its beginning among the ``count`` best
    beginnings, so no other is kept, and the result is exact for any number of factors.

    Args:
        log_probabilities: For each choice the log-probabilities, ``[samples, options]``.
        count: How many combinations, at least 1.

    Returns:
        Log-probabilities ``[samples, k]``, the largest first, and the options chosen, int64
        ``[samples, k, choices]``; :math:`k` is ``count``, or the number of all combinations if that
        is smaller.

    Raises:
        ValueError: If there is no choice or ``count`` is below 1.

    Example:
        >>> import torch
        >>> coin, die = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.6, 0.3, 0.1]])
        >>> logs, options = most_likely_combinations([coin.log(), die.log()], count=2)
        >>> logs.exp().round(decimals=2), options
        (tensor([[0.4200, 0.2100]]), tensor([[[0, 0],
                 [0, 1]]]))
    """
    if not log_probabilities:
        raise ValueError("`log_probabilities` must hold at least one choice, got none.")
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    first = log_probabilities[0]
    best = first.new_zeros(len(first), 1)
    options = torch.zeros(len(first), 1, 0, dtype=torch.int64, device=first.device)
    for factor in log_probabilities:
        values, chosen = factor.topk(min(count, factor.shape[1]), dim=1)
        sums = best[:, :, None] + values[:, None, :]
        best, flat = sums.flatten(1).topk(min(count, sums.shape[1] * sums.shape[2]), dim=1)
        before = flat.div(values.shape[1], rounding_mode="floor")
        kept = options.gather(1, before[:, :, None].expand(-1, -1, options.shape[2]))
        new = chosen.gather(1, flat % values.shape[1])
        options = torch.cat([kept, new[:, :, None]], dim=2)
    return best, options


class RiskCoverage(NamedTuple):
    """Accuracy against coverage, a point for each confidence that occurs, the highest first."""

    threshold: Tensor
    """What a confidence must reach to be answered."""
    coverage: Tensor
    """The share of samples that are answered."""
    accuracy: Tensor
    """The share of the answers that are right; 1 minus the risk."""


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """Accuracy on the samples that are answered, for every threshold of confidence.

    El-Yaniv and Wiener, 2010, `JMLR 11
    <https://www.jmlr.org/papers/v11/el-yaniv10a.html>`_; Geifman and El-Yaniv, 2017,
    `arXiv:1705.08500 <https://arxiv.org/abs/1705.08500>`_. Samples of equal confidence are answered
    together.

    Args:
        confidence: How sure each answer is, ``[samples]``.
        correct: Whether it is right, bool or 0 and 1, ``[samples]``.

    Returns:
        Float64, ``[different confidences]`` each.

    Raises:
        ValueError: If there are no samples, the shapes differ, or a confidence is NaN.

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.9, 0.6, 0.6, 0.2]), torch.tensor([1, 1, 0, 0]))
        >>> curve.coverage.tolist(), [round(a, 3) for a in curve.accuracy.tolist()]
        ([0.25, 0.75, 1.0], [1.0, 0.667, 0.5])
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            "`confidence` and `correct` must have the same shape [samples] with at least one, got "
            f"{list(confidence.shape)} and {list(correct.shape)}."
        )
    if confidence.isnan().any():
        raise ValueError("`confidence` must be numbers, got NaN. Leave such samples out.")
    order = confidence.argsort(descending=True)
    sure = confidence[order].double()
    right = correct[order].double().cumsum(0)
    answered = torch.arange(1, len(sure) + 1, dtype=torch.float64, device=sure.device)
    last = torch.cat([sure[1:] != sure[:-1], torch.ones(1, dtype=torch.bool, device=sure.device)])
    return RiskCoverage(sure[last], (answered / len(sure))[last], (right / answered)[last])


def area_under_risk(curve: RiskCoverage) -> float:
    """The mean risk over all coverages (AURC); smaller is better.

    Args:
        curve: Of :func:`risk_coverage`.

    Returns:
        The sum of the risks, each times the coverage that it adds; in [0, 1].

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.9, 0.5]), torch.tensor([1, 0]))
        >>> area_under_risk(curve)
        0.25
    """
    added = curve.coverage.diff(prepend=curve.coverage.new_zeros(1))
    return float(((1 - curve.accuracy) * added).sum())
