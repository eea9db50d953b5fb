"""Calibration, Brier score and predictive entropy as metrics: sums, however many samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.calibration import (
    brier_scores,
    calibration_bins,
    calibration_error,
    predictive_entropy,
)

__all__ = ["BrierScore", "ExpectedCalibrationError", "PredictiveEntropy"]


class ExpectedCalibrationError(Metric):
    r"""Expected calibration error of logits.

    :func:`lightning_flatmtl.functional.calibration_error` has the formula. The confidence is the
    greatest probability of the softmax, its outcome whether that class is right; of a binary logit
    the probability of class 1, its outcome whether the class is 1. So are they in torchmetrics'
    ``MulticlassCalibrationError`` and ``BinaryCalibrationError``, whose values these are. Those
    keep every confidence, and count in float32; here the bins are summed up in float64 as samples
    come, which is exact for the pixels of images, too. Nor are logits within [0, 1] taken for
    probabilities, and a confidence of exactly 1 belongs to the last bin.

    Logits are ``[n, classes, ...]`` with targets ``[n, ...]``, or binary ones of the targets' own
    shape.

    Args:
        n_bins: The number of bins, at least 1.

    Raises:
        ValueError: If ``n_bins`` is below 1.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import ExpectedCalibrationError
        >>> metric = ExpectedCalibrationError(n_bins=10)
        >>> metric(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        tensor(0.4500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    bins: Tensor

    def __init__(self, n_bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
            raise ValueError(f"`n_bins` must be an integer >= 1, got {n_bins!r}.")
        self.n_bins = n_bins
        self.add_state("bins", torch.zeros(3, n_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples, see the class."""
        logits, labels = flattened(preds, target)
        if logits.ndim == 1:
            self.bins += calibration_bins(logits.sigmoid(), labels == 1, self.n_bins)
        else:
            confidences, classes = logits.softmax(1).max(1)
            self.bins += calibration_bins(confidences, classes == labels, self.n_bins)

    def compute(self) -> Tensor:
        """The error over all samples, NaN if there is none."""
        return calibration_error(self.bins)


class BrierScore(Metric):
    r"""Mean of :func:`lightning_flatmtl.functional.brier_scores` of logits.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import BrierScore
        >>> metric = BrierScore()
        >>> metric(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0]))
        tensor(0.3750, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "count"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, zero, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples, as for :class:`ExpectedCalibrationError`."""
        logits, labels = flattened(preds, target)
        probabilities = logits.sigmoid() if logits.ndim == 1 else logits.softmax(1)
        self.total = self.total + brier_scores(probabilities, labels).sum()
        self.count = self.count + len(labels)

    def compute(self) -> Tensor:
        """The mean over all samples, NaN if there is none."""
        return self.total / self.count


class PredictiveEntropy(Metric):
    r"""Mean of :func:`lightning_flatmtl.functional.predictive_entropy`, in nats.

    Args:
        n_bins: The bins of ``histogram``, at least 1.

    Attributes:
        histogram: How many samples have an entropy in each of the bins of equal width, from 0 to
            its greatest value, the logarithm of the number of classes; float64 ``[n_bins]``.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import PredictiveEntropy
        >>> metric = PredictiveEntropy()
        >>> metric(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))  # half of ln 2
        tensor(0.3466, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    full_state_update = False

    total: Tensor
    histogram: Tensor

    def __init__(self, n_bins: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
            raise ValueError(f"`n_bins` must be an integer >= 1, got {n_bins!r}.")
        self.n_bins = n_bins
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        empty = torch.zeros(n_bins, dtype=torch.float64)
        self.add_state("histogram", empty, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Add samples.

        Args:
            preds: Logits ``[n, classes, ...]``, or binary ones ``[n]``.
            target: Not looked at; given, it says whether logits of its own shape are binary.
        """
        if target is None:
            target = preds if preds.ndim == 1 else preds[:, 0]
        logits, _ = flattened(preds, target)
        entropies = predictive_entropy(logits)
        classes = 2 if logits.ndim == 1 else logits.shape[1]
        shares = (entropies.detach() / math.log(classes)).clamp(0, 1)
        self.total = self.total + entropies.sum()
        self.histogram = self.histogram + calibration_bins(shares, shares, self.n_bins)[0]

    def compute(self) -> Tensor:
        """The mean over all samples in nats, NaN if there is none."""
        return self.total / self.histogram.sum()


def flattened(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, ``[n]`` or ``[n, classes]``, and targets ``[n]``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.shape == target.shape:
        return logits.double().flatten(), target.flatten()
    rest = logits.shape[:1] + logits.shape[2:]
    if logits.ndim != target.ndim + 1 or rest != target.shape or logits.shape[1] < 2:
        raise ValueError(
            "`preds` must be logits [n, classes, ...] of two or more classes with targets "
            "[n, ...], or binary logits of the shape of the targets, got "
            f"{list(logits.shape)} and {list(target.shape)}."
        )
    classes_last = logits.double().movedim(1, -1)
    return classes_last.reshape(-1, logits.shape[1]), target.flatten()
