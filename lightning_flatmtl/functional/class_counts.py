"""How often classes are predicted, labelled, and both: for F1 and balanced accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_flatmtl.functional.error_rate import wrong_predictions

__all__ = ["balanced_accuracy", "class_counts", "label_counts", "macro_f1"]


def class_counts(
    logits: Tensor, target: Tensor, num_classes: int, missing: int | None = None
) -> Tensor:
    r"""Of every class: how often it is hit, predicted and labelled.

    As in :func:`wrong_predictions`, of equal logits the first class counts, of a binary logit 0
    class 0, and a sample with NaN among its logits is wrong: none of its classes is predicted.

    Args:
        logits: ``[n, num_classes, ...]``, or binary ones, of the shape of the targets.
        target: Classes ``[n, ...]``.
        num_classes: Their number, at least 2; 2 for binary logits.
        missing: Entries with this target are not counted.

    Returns:
        int64 ``[3, num_classes]``.

    Raises:
        ValueError: If the shapes do not fit, or a target is none of the classes.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.functional import class_counts
        >>> class_counts(torch.tensor([1.5, -0.5, 2.0]), torch.tensor([1, 1, 0]), 2)
        tensor([[0, 1],
                [1, 2],
                [1, 2]])
    """
    binary = logits.shape == target.shape
    if num_classes < 2 or (2 if binary else logits.shape[1:2].numel()) != num_classes:
        raise ValueError(
            f"`logits` must be [n, {num_classes}, ...], as `num_classes` says (or binary, for 2), "
            f"got {list(logits.shape)} with targets {list(target.shape)}."
        )
    wrong_predictions(logits, target)  # the shapes
    there = torch.ones_like(target, dtype=torch.bool) if missing is None else target != missing
    if binary:
        predicted, unknown = (logits > 0).long(), logits.isnan()
    else:
        predicted, unknown = _classes(logits), logits.isnan().any(1)
    fits = (target >= 0) & (target < num_classes) | ~there
    if target.device.type == "cpu" and not fits.all():  # elsewhere the device asserts it
        raise ValueError(f"`target` must be in [0, {num_classes}), got {target[~fits][0].item()}.")
    target, known = target.long(), there & ~unknown
    parts = ((target, known & (predicted == target)), (predicted, known), (target, there))
    return torch.stack([_counted(classes, which, num_classes) for classes, which in parts])


def label_counts(logits: Tensor, target: Tensor, missing: float | None = None) -> Tensor:
    """Of every label: how often it is hit, predicted and given.

    Args:
        logits: ``[n, labels]``; a label is predicted where its logit is above 0.
        target: 0 or 1, ``[n, labels]``.
        missing: Entries with this target are not counted; it may be NaN.

    Returns:
        int64 ``[3, labels]``.

    Raises:
        ValueError: If the shapes differ, or have not two axes.
    """
    if logits.shape != target.shape or logits.ndim != 2:
        raise ValueError(
            "`logits` and `target` must both be [n, labels], got "
            f"{list(logits.shape)} and {list(target.shape)}."
        )
    there = labelled(target, missing)
    predicted, given = (logits > 0) & there, (target == 1) & there
    return torch.stack([part.sum(0) for part in (predicted & given, predicted, given)])


def labelled(target: Tensor, missing: float | None) -> Tensor:
    """Which entries of a target have a label."""
    if missing is None:
        return torch.ones_like(target, dtype=torch.bool)
    there: Tensor = ~target.isnan() if math.isnan(missing) else target != missing
    return there


def macro_f1(counts: Tensor) -> Tensor:
    r"""The mean over classes of :math:`F_1 = 2\,h / (p + l)`, of hits, predictions and labels.

    A class that is neither predicted nor labelled is left out; NaN if there is no other.

    Args:
        counts: Of :func:`class_counts` or :func:`label_counts`, ``[3, classes]``.

    Returns:
        A scalar, float64.
    """
    hits, predicted, given = counts.double()
    mean: Tensor = (2 * hits / (predicted + given)).nanmean()
    return mean


def balanced_accuracy(counts: Tensor) -> Tensor:
    """The mean over classes of the share of their samples that are hit.

    A class without samples is left out; NaN if there is no other.

    Args:
        counts: Of :func:`class_counts`, ``[3, classes]``.

    Returns:
        A scalar, float64.
    """
    hits, _, given = counts.double()
    mean: Tensor = (hits / given).nanmean()
    return mean


def _counted(classes: Tensor, which: Tensor, number: int) -> Tensor:
    """How often each class is among ``classes[which]``, without waiting for a device."""
    at = torch.where(which, classes, number).flatten()
    counts = torch.zeros(number + 1, dtype=torch.int64, device=at.device)
    return counts.scatter_add_(0, at, torch.ones_like(at))[:number]


def _classes(logits: Tensor) -> Tensor:
    """The first of the greatest along axis 1, 0 where there is NaN."""
    at = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    greatest = logits == logits.amax(1, keepdim=True)
    return torch.where(greatest, at, logits.shape[1]).amin(1) % logits.shape[1]
