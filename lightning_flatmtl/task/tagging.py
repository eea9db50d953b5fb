"""A class for every token of a sequence."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_flatmtl.functional import segmentation_loss
from lightning_flatmtl.metrics.class_counts import MacroF1
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._entries import mean_by_sample

__all__ = ["TaggingTask"]


class TaggingTask(Task):
    r"""Tagging: a linear head to a class for every token, cross-entropy, accuracy and F1.

    The features are the states of the tokens, ``[n, longest, in_features]``, which an encoder hands
    to the tasks of its ``token_tasks``; with parts they have one axis more. Targets are int64
    ``[n, longest]``, padding has ``ignore_index``. Predictions are logits ``[n, num_classes,
    longest]``, the order that torch's losses and metrics want.

    Padding, and what else has no label, counts neither in the loss nor in the metrics. A sequence
    without any label is left out, as a sample without a label; a batch of nothing else leaves the
    task out of the step.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of a token's state.
        num_classes: Number of tags, at least 2.
        ignore_index: The value of tokens that have no label.
        mean: ``"sequences"``: the loss is the mean over the sequences of the mean over a sequence's
            tokens. Every sequence counts the same, and several processes, or accumulated batches,
            have exactly the loss of one. ``"tokens"``: the mean over all tokens of the batch, which
            is torch's; then a process with few tokens counts for too much.
        metrics: Metrics of logits by name; by default ``accuracy``, the share of tokens that are
            right, and ``f1``, :class:`~lightning_flatmtl.metrics.MacroF1`.

    Raises:
        ValueError: If ``num_classes`` is below 2, ``mean`` is not known or, in training, the
            features are no states of tokens.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.task import TaggingTask
        >>> task = TaggingTask("tags", in_features=64, num_classes=5)
        >>> task.head(torch.zeros(2, 7, 64)).shape, sorted(task.metrics)
        (torch.Size([2, 5, 7]), ['accuracy', 'f1'])
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        num_classes: int,
        ignore_index: int = -100,
        mean: Literal["sequences", "tokens"] = "sequences",
        metrics: dict[str, Metric] | MetricCollection | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if mean not in {"sequences", "tokens"}:
            raise ValueError(f"`mean` must be 'sequences' or 'tokens', got {mean!r}.")
        # Tags that are no class are refused by the loss; torchmetrics' look at them sorts all.
        settings: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
        given: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", **settings),
            "f1": MacroF1(num_classes, missing=ignore_index),
        }
        super().__init__(
            name,
            head=_TagHead(name, in_features, num_classes),
            loss=_Loss(ignore_index, mean),
            metrics=given if metrics is None else metrics,
            missing=ignore_index,
        )


class _TagHead(nn.Linear):
    """Logits of every token, the classes behind the samples' axis."""

    def __init__(self, task: str, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self._task = task

    @override
    def forward(self, states: Tensor) -> Tensor:
        if not isinstance(states, Tensor) or states.ndim < 3:
            got = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(
                f"Tagging '{self._task}' needs the states of tokens, [n, longest, "
                f"{self.in_features}], got {got}. Name the task in `token_tasks` of the encoder."
            )
        return super().forward(states).movedim(-1, 1)


class _Loss(nn.Module):
    """Cross-entropy of the tokens that have a label."""

    def __init__(self, ignore_index: int, mean: str) -> None:
        super().__init__()
        self.ignore_index, self.mean = ignore_index, mean

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.mean == "tokens":
            return segmentation_loss(logits, target, self.ignore_index)
        losses = cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        return mean_by_sample(losses, target != self.ignore_index)
