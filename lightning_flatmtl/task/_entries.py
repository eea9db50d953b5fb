"""Losses of tasks whose samples have several entries, some of them without a label."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional.class_counts import labelled

__all__ = ["filled", "mean_by_sample"]


def filled(target: Tensor, missing: float | None) -> tuple[Tensor, Tensor]:
    """The target with 0 where it has no label, and where it has one."""
    there = labelled(target, missing)
    return target.masked_fill(~there, 0), there


def mean_by_sample(losses: Tensor, there: Tensor) -> Tensor:
    """Mean over the samples of the mean over a sample's labelled entries.

    So every sample counts the same, as the weights of the tasks and of several processes suppose,
    however many of its entries have a label; samples without any are left out.
    """
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    losses, there = losses.reshape(len(losses), -1), there.reshape(len(there), -1)
    of_sample = losses.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)
    return of_sample.sum() / there.any(1).sum().clamp(min=1)
