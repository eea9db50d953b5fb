"""How well the probabilities of a classifier say how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["brier_scores", "calibration_bins", "calibration_error", "predictive_entropy"]


def calibration_bins(confidences: Tensor, outcomes: Tensor, n_bins: int = 10) -> Tensor:
    r"""Sums over bins of equal width, which a reliability diagram is drawn from.

    Bin :math:`b` of :math:`B` holds the confidences in :math:`[b / B, (b + 1) / B)`, the last one
    those of 1 as well. The bins of several batches are added up.

    Args:
        confidences: Probabilities in [0, 1], ``[n]``.
        outcomes: What they are the probabilities of: 1 where it came about, else 0, ``[n]``.
        n_bins: The number of bins, at least 1.

    Returns:
        ``[3, n_bins]`` in float64 on the device of the confidences: how many confidences a bin
        has, their sum, and the sum of their outcomes.

    Raises:
        ValueError: If the shapes differ or ``n_bins`` is below 1.

    Example:
        >>> import torch
        >>> calibration_bins(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([1, 0, 1]), n_bins=2)
        tensor([[1.0000, 2.0000],
                [0.2500, 1.7500],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    if confidences.ndim != 1 or confidences.shape != outcomes.shape:
        raise ValueError(
            "`confidences` and `outcomes` must have the same shape [n], got "
            f"{list(confidences.shape)} and {list(outcomes.shape)}."
        )
    if n_bins < 1:
        raise ValueError(f"`n_bins` must be an integer >= 1, got {n_bins}.")
    confidences = confidences.double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidences.device)
    which = torch.bucketize(confidences, edges[1:-1], right=True)
    # A product instead of a scattered sum: the same result in every run, on every device.
    members = torch.stack([torch.ones_like(confidences), confidences, outcomes.double()])
    found = members.new_zeros(3, n_bins)
    for b in range(n_bins):
        found[:, b] = torch.where(which == b, members, 0.0).sum(1)
    return found


def calibration_error(bins: Tensor) -> Tensor:
    r"""Expected calibration error (Guo et al., 2017).

    .. math::
        \mathrm{ECE} = \sum_b \frac{n_b}{n}\, |\mathrm{acc}(b) - \mathrm{conf}(b)|

    over the bins: how far the share of outcomes lies from the mean confidence there
    (`arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_).

    Args:
        bins: What :func:`calibration_bins` returned, ``[3, n_bins]``, or a sum of such.

    Returns:
        A scalar in [0, 1], float64; NaN without any confidence.

    Raises:
        ValueError: If ``bins`` has another shape.

    Example:
        >>> import torch
        >>> bins = calibration_bins(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0, 1, 1]))
        >>> calibration_error(bins)  # (0.25 + 0.25 + 0) / 3
        tensor(0.1667, dtype=torch.float64)
    """
    if bins.ndim != 2 or len(bins) != 3:
        raise ValueError(f"`bins` must have the shape [3, n_bins], got {list(bins.shape)}.")
    counts, confidences, outcomes = bins.double()
    error: Tensor = (outcomes - confidences).abs().sum() / counts.sum()
    return error


def brier_scores(probabilities: Tensor, target: Tensor) -> Tensor:
    r"""Squared error of the probabilities of every sample (Brier, 1950).

    With several classes :math:`\sum_c (p_c - 1[y = c])^2`, in [0, 2], as Brier has it; of a single
    probability :math:`(p - y)^2`, in [0, 1], which is half of that
    (`Monthly Weather Review 78
    <https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2>`_).

    Args:
        probabilities: Those of the classes, ``[n, classes]``, or of class 1, ``[n]``.
        target: The classes, ``[n]``.

    Returns:
        ``[n]``; the lower, the better.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> brier_scores(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0]))
        tensor([0.3750])
        >>> brier_scores(torch.tensor([0.75]), torch.tensor([1]))
        tensor([0.0625])
    """
    if target.ndim != 1 or probabilities.ndim not in {1, 2} or len(probabilities) != len(target):
        raise ValueError(
            "`probabilities` must have the shape [n] or [n, classes] and `target` [n], got "
            f"{list(probabilities.shape)} and {list(target.shape)}."
        )
    if probabilities.ndim == 1:
        return (probabilities - target.to(probabilities.dtype)).square()
    classes = torch.arange(probabilities.shape[1], device=target.device)
    hit = (target[:, None] == classes).to(probabilities.dtype)
    return (probabilities - hit).square().sum(1)


def predictive_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of what a classifier predicts, :math:`-\sum_c p_c \ln p_c` with its softmax p.

    0 where it is certain, :math:`\ln C` where all C classes are equally likely. A binary
    classifier's single logit has the two probabilities :math:`\sigma(z)` and :math:`\sigma(-z)`.

    Args:
        logits: Of the classes, ``[n, classes]``, or of class 1 against class 0, ``[n]``.

    Returns:
        ``[n]``, in nats.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> import torch
        >>> predictive_entropy(torch.tensor([[0.0, 0.0], [1e4, 0.0]]))
        tensor([0.6931, 0.0000])
        >>> predictive_entropy(torch.tensor([0.0]))
        tensor([0.6931])
    """
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], 1)
    if logits.ndim != 2:
        raise ValueError(
            f"`logits` must have the shape [n] or [n, classes], got {list(logits.shape)}."
        )
    entropies: Tensor = torch.special.entr(logits.softmax(1)).sum(1)
    return entropies
