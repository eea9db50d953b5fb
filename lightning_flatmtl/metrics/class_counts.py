"""Figures that count every class the same, however rare it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.class_counts import (
    balanced_accuracy,
    class_counts,
    label_counts,
    macro_f1,
)

__all__ = ["BalancedAccuracy", "LabelF1", "MacroF1"]


class _Counts(Metric):
    """Hits, predictions and labels by class, over the epoch and all processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, number: int, name: str, least: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if number < least:
            raise ValueError(f"`{name}` must be at least {least}, got {number}.")
        self.add_state("counts", torch.zeros(3, number, dtype=torch.int64), dist_reduce_fx="sum")


class _ClassCounts(_Counts):
    """Counts of the classes of one task."""

    def __init__(self, num_classes: int = 2, missing: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, "num_classes", 2, **kwargs)
        self.missing = missing

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            preds: Logits ``[n, num_classes, ...]``, or binary ones of the shape of the targets.
            target: Classes ``[n, ...]``.
        """
        found = class_counts(preds, target, self.counts.shape[1], self.missing)
        self.counts = self.counts + found


class BalancedAccuracy(_ClassCounts):
    """Mean over the classes of the share of their samples that are hit, in [0, 1].

    Always saying the same class gives one over the number of classes, however frequent that class
    is. A class without samples is left out. Over the whole epoch and all processes; logits are
    compared as they are, see :func:`~lightning_flatmtl.functional.class_counts`.

    Args:
        num_classes: Number of classes, at least 2; 2 for binary logits.
        missing: Entries with this target are not counted.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import BalancedAccuracy
        >>> metric = BalancedAccuracy()
        >>> metric(torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([1, 1, 1, 0]))
        tensor(0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The mean, float64; NaN without a sample."""
        return balanced_accuracy(self.counts)


class MacroF1(_ClassCounts):
    r"""Mean over the classes of the harmonic mean of precision and recall, in [0, 1].

    A class that is neither predicted nor labelled is left out. Binary tasks have two classes, both
    of which count. Over the whole epoch and all processes; logits are compared as they are, see
    :func:`~lightning_flatmtl.functional.class_counts`.

    Args:
        num_classes: Number of classes, at least 2; 2 for binary logits.
        missing: Entries with this target are not counted, such as the padding of sequences.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import MacroF1
        >>> metric = MacroF1()
        >>> metric(torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([1, 1, 1, 0]))  # 6/7 and 0
        tensor(0.4286, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The mean, float64; NaN without a sample."""
        return macro_f1(self.counts)


class LabelF1(_Counts):
    r"""Mean over the labels of a multi-label task of the F1 score of "yes", in [0, 1].

    A label is predicted where its logit is above 0. One that is neither predicted nor given is left
    out. Over the whole epoch and all processes.

    Args:
        num_labels: Number of labels, at least 1.
        missing: Entries with this target are not counted; it may be NaN.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import LabelF1
        >>> metric = LabelF1(2)
        >>> metric(torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.tensor([[1, 1], [0, 0]]))
        tensor(0.8333, dtype=torch.float64)
    """

    def __init__(self, num_labels: int, missing: float | None = None, **kwargs: Any) -> None:
        super().__init__(num_labels, "num_labels", 1, **kwargs)
        self.missing = missing

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            preds: Logits ``[n, num_labels]``.
            target: 0 or 1, ``[n, num_labels]``.
        """
        self.counts = self.counts + label_counts(preds, target, self.missing)

    def compute(self) -> Tensor:
        """The mean, float64; NaN without a sample."""
        return macro_f1(self.counts)
