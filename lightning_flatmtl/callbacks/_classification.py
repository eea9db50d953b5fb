"""Telling classifications from other tasks, by what is predicted and what is right."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = ["KINDS", "Kind", "Labelled", "kind_by_loss", "labelled", "unlabelled"]

Kind = Literal["binary", "multiclass"]
KINDS = ("binary", "multiclass")

_BINARY = (nn.BCEWithLogitsLoss,)
_MULTICLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
_OTHER = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.BCELoss)

_ONE = 1e-3
"""How near to 1 the sum of probabilities is."""


@dataclass(frozen=True)
class Labelled:
    """The samples of a batch that have a label.

    Args:
        kind: What classification it is.
        logits: ``[n]`` if binary, else ``[n, classes]``.
        target: ``[n]``.
    """

    kind: Kind
    logits: Tensor
    target: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return 2 if self.kind == "binary" else self.logits.shape[1]

    def has_probabilities(self) -> bool:
        """Whether all samples have a distribution over the classes in the place of logits."""
        if self.kind == "binary":
            return False
        near = (self.logits.sum(1) - 1).abs() < _ONE
        return bool(((self.logits >= 0).all(1) & near).all())


def kind_by_loss(loss: Any) -> Kind | Literal["other"] | None:
    """What a task's loss says of its kind; ``None`` if nothing."""
    if isinstance(loss, _BINARY) or loss is nn.functional.binary_cross_entropy_with_logits:
        return "binary"
    if isinstance(loss, _MULTICLASS) or loss is nn.functional.cross_entropy:
        return "multiclass"
    return "other" if isinstance(loss, _OTHER) else None


def labelled(
    task: str,
    logits: Any,
    target: Any,
    kind: Kind | Literal["other"] | None = None,
    ignored: int | None = None,
    asked: bool = False,
) -> Labelled | None:
    """What a batch has of a classification, ``None`` if the task is none.

    Args:
        task: Its name.
        logits: What is predicted.
        target: What is right. Labels below zero, and NaN, are those of no class.
        kind: What is known of the task.
        ignored: One more label that is that of no class.
        asked: Whether it was said that the task is a classification.

    Raises:
        MisconfigurationException: If a label of a classification is none of its classes.
    """
    found = _kind(logits, target, kind)
    if found is None:
        return None
    if found == "multiclass":
        classes = logits.shape[1]
        logits = logits.movedim(1, -1).reshape(-1, classes)
    else:
        classes = 2
        logits = logits.flatten()
    target = target.flatten()
    has_label = target >= 0
    if ignored is not None:
        has_label &= target != ignored
    logits, target = logits[has_label], target[has_label]
    of_no_class = (target >= classes) | (target != target.long())
    if bool(of_no_class.any()):
        if found == "binary" and not (asked and kind):
            return None  # numbers, or probabilities
        raise MisconfigurationException(
            f"Calibration expects labels from 0 to {classes - 1} of the {found} task '{task}', got "
            f"{target[of_no_class][0].item():g}. Correct the label, or leave the task out of "
            "`tasks`."
        )
    return Labelled(found, logits, target.long())


def unlabelled(task: str, logits: Any, kind: Kind, classes: int) -> Tensor:
    """Logits without labels, of a task that is known: ``[n]`` if binary, else ``[n, classes]``.

    Raises:
        MisconfigurationException: If they are not of its classes.
    """
    if isinstance(logits, Tensor) and logits.is_floating_point():
        if kind == "binary":
            return logits.flatten()
        if logits.ndim > 1 and logits.shape[1] == classes:
            return logits.movedim(1, -1).reshape(-1, classes)
    got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise MisconfigurationException(
        f"Calibration expects logits [n, {classes}, ...] of task '{task}' out of domain, as in "
        f"evaluation, got {got}. Return from `predict_step` or `forward` what the loss takes."
    )


def _kind(logits: Any, target: Any, known: str | None) -> Kind | None:
    """What predictions and targets look like, as far as it does not contradict what is known."""
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        return None
    if not logits.is_floating_point() or target.is_complex() or logits.ndim == 0:
        return None
    whole = not target.is_floating_point()
    if known in {"multiclass", None} and whole and logits.ndim == target.ndim + 1:
        rest = logits.shape[:1] + logits.shape[2:]
        if rest == target.shape and logits.shape[1] > 1:
            return "multiclass"
    if known in {"binary", None}:
        single = logits.shape[:-1] if logits.shape[-1] == 1 else logits.shape
        if target.shape in {logits.shape, single, (*logits.shape, 1)}:
            return "binary"
    return None
