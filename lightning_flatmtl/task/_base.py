"""Task: what one task of a multi-task module consists of."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

__all__ = ["Task"]

Loss = Callable[[Any, Any], Tensor]


class Task:
    """One task: its name, its head, its loss and its metrics.

    Args:
        name: Names the task in batches, logs and messages; no ``/`` or ``.`` in it.
        head: Maps the encoder's features to predictions; not needed where ``losses`` is overridden.
        loss: Maps predictions and target to a scalar loss.
        metrics: Metrics by name, or one collection; a copy for each of training, validation and
            test is updated with predictions and target and logged as ``{stage}/{task}/{name}``.
        missing: How a missing label looks, such as ``-1`` or ``float("nan")``. Samples without a
            label are left out of the task's loss and metrics; a batch without any leaves the task
            out. A sample counts as missing if all entries of its target are: what a loss is to
            ignore within a sample (pixels, tokens) is the loss's own affair, for example
            ``CrossEntropyLoss(ignore_index=...)``. ``None`` if every sample has a label.

    Raises:
        ValueError: If the name cannot be used.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> from torch import nn
        >>> Task("left", head=nn.Linear(64, 10), loss=nn.CrossEntropyLoss(), missing=-1)
        Task('left')
    """

    def __init__(
        self,
        name: str,
        head: nn.Module | None = None,
        loss: nn.Module | Loss | None = None,
        metrics: dict[str, Metric] | MetricCollection | None = None,
        missing: float | None = None,
    ) -> None:
        if not isinstance(name, str) or not name or any(c in name for c in "/. "):
            raise ValueError(
                f"`name` must be a non-empty string without '/', '.' and spaces, got {name!r}."
            )
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"`name` must not be an attribute of torch's ModuleDict, got {name!r}; choose "
                f"another, for example '{name}_task'."
            )
        if head is not None and not isinstance(head, nn.Module):
            raise TypeError(f"`head` must be an nn.Module, got {type(head).__name__}.")
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
            raise TypeError(f"`loss` must be callable, such as `nn.MSELoss()`, got {got}.")
        if missing is not None and (
            isinstance(missing, bool) or not isinstance(missing, int | float)
        ):
            raise TypeError(f"`missing` must be a number such as -1 or nan, got {missing!r}.")
        self.name = name
        self.missing = missing
        self.head = head
        self.loss = loss
        self.metrics: dict[str, Metric] = _by_name(metrics)

    def labelled(self, predictions: Any, target: Any) -> tuple[Any, Any] | None:
        """Predictions and target of the samples that have a label, ``None`` if none has.

        Args:
            predictions: A tensor, or a structure of tensors, with the samples in the first axis.
            target: A tensor with the samples in the first axis; anything if ``missing`` is None.

        Raises:
            TypeError: If ``missing`` is given and the target is not a tensor.

        Example:
            >>> import torch
            >>> task = Task("age", missing=float("nan"))
            >>> task.labelled(torch.arange(3.0), torch.tensor([5.0, float("nan"), 7.0]))
            (tensor([0., 2.]), tensor([5., 7.]))
        """
        if self.missing is None:
            return predictions, target
        if not isinstance(target, Tensor) or target.ndim == 0:
            got = "a scalar" if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"Task '{self.name}' has `missing={self.missing}` and needs targets that are "
                f"tensors with one entry or more per sample, got {got}. Override `task_loss` and "
                "return None where there is no label."
            )
        self._check_type(target)
        absent = target.isnan() if math.isnan(self.missing) else target == self.missing
        keep = ~absent.flatten(1).all(1) if absent.ndim > 1 else ~absent
        found = int(keep.sum())
        if found == 0:
            return None
        if found == len(target):
            return predictions, target

        def of_labelled(tensor: Tensor) -> Tensor:
            fits = tensor.ndim > 0 and len(tensor) == len(keep)
            return tensor[keep] if fits else tensor

        return pytree.tree_map_only(Tensor, of_labelled, predictions), target[keep]

    def _check_type(self, target: Tensor) -> None:
        assert self.missing is not None
        kind = target.dtype
        never = kind == torch.bool or (math.isnan(self.missing) and not kind.is_floating_point)
        if never:
            raise TypeError(
                f"Task '{self.name}' has `missing={self.missing}`, which no target of type {kind} "
                "can be. Use targets of another type, or another value."
            )

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    # A task equals its name, so that `targets[task]` and `heads[task]` work with either.
    def __eq__(self, other: object) -> bool:
        return self.name == other if isinstance(other, str) else self is other

    def __hash__(self) -> int:
        return hash(self.name)


def _by_name(metrics: Mapping[str, Metric] | MetricCollection | None) -> dict[str, Metric]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping | MetricCollection):
        raise TypeError(
            "`metrics` must be a mapping from names to torchmetrics metrics, got "
            f"{type(metrics).__name__}."
        )
    found = dict(metrics.items())
    if "loss" in found:
        raise ValueError(
            "A metric must not be named 'loss', which is what the task's loss is logged as; choose "
            "another name."
        )
    for name, metric in found.items():
        if not isinstance(metric, Metric):
            raise TypeError(f"Metric '{name}' must be a Metric, got {type(metric).__name__}.")
    return found
