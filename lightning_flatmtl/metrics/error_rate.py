"""Share of wrong predictions, of one task and on average over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.error_rate import wrong_predictions

__all__ = ["ErrorRate", "MeanErrorRate"]


class ErrorRate(Metric):
    r"""Share of wrong predictions of one task, in [0, 1]: one minus the accuracy.

    :func:`lightning_flatmtl.functional.wrong_predictions` says what is wrong. Samples are counted
    in integers, over the whole epoch and all processes.

    Args:
        missing: How a missing label looks; samples without one are not counted. ``None`` if every
            sample has one. :class:`~lightning_flatmtl.Task` leaves out samples without a label by
            itself; within a sample (pixels) that is said here.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import ErrorRate
        >>> metric = ErrorRate(missing=-1)
        >>> metric(torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, -1]))
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    wrong: Tensor
    count: Tensor

    def __init__(self, missing: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.missing = missing
        for name in ("wrong", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            preds: Logits ``[n, classes, ...]``, or binary ones of the shape of the targets.
            target: Classes ``[n, ...]``.
        """
        wrong, labelled = _counted(preds, target, self.missing)
        self.wrong = self.wrong + wrong.sum()
        self.count = self.count + labelled.sum()

    def compute(self) -> Tensor:
        """The share over all samples, float64; NaN if there is none."""
        return self.wrong.double() / self.count


class MeanErrorRate(Metric):
    r"""Mean over tasks of the share of wrong predictions, in [0, 1].

    .. math::
        \bar e = \frac{1}{|T|} \sum_{t \in T}
        \frac{\text{wrong predictions of task } t}{\text{labels of task } t}

    over the tasks :math:`T` that have a label at all. So every task weighs the same, however many
    of its labels are missing, which the share of wrong labels among all would not do. What the
    paper's table of CelebA has, over forty tasks.

    Args:
        tasks: Their number, or their names: then predictions and targets are mappings by name,
            which need not have all of them.
        missing: How a missing label looks; ``None`` if every sample has one.

    Raises:
        ValueError: If there is no task, or names come twice or are not known.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import MeanErrorRate
        >>> metric = MeanErrorRate(tasks=2, missing=-1)
        >>> logits = torch.tensor([[1.0, -2.0], [1.0, 2.0], [-1.0, 2.0]])
        >>> metric(logits, torch.tensor([[1, 1], [1, -1], [1, -1]]))  # 1 of 3, 1 of 1
        tensor(0.6667, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    wrong: Tensor
    count: Tensor

    def __init__(
        self, tasks: int | Sequence[str], missing: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.names = None if isinstance(tasks, int) else tuple(tasks)
        number = tasks if isinstance(tasks, int) else len(tasks)
        if number < 1 or isinstance(tasks, bool):
            raise ValueError(f"`tasks` must be a number >= 1 or names of tasks, got {tasks!r}.")
        if self.names is not None and len(set(self.names)) != number:
            raise ValueError(f"`tasks` must have different names, got {list(self.names)}.")
        self.missing = missing
        for name in ("wrong", "count"):
            self.add_state(name, torch.zeros(number, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, preds: Tensor | Mapping[str, Tensor], target: Tensor | Mapping[str, Tensor]
    ) -> None:
        """Add samples.

        Args:
            preds: Binary logits ``[n, tasks]``, or ``[n, classes, tasks]``; with names, of each
                task ``[n]`` or ``[n, classes]``.
            target: Classes ``[n, tasks]``; with names, of each task ``[n]``.
        """
        if self.names is None:
            self._add_tensors(preds, target)
        else:
            self._add_mappings(self.names, preds, target)

    @property
    def by_task(self) -> Tensor:
        """The share of each task, float64 ``[tasks]``, NaN without a label; of this process."""
        return self.wrong.double() / self.count

    def compute(self) -> Tensor:
        """The mean, float64; NaN if no task has a label."""
        return self.by_task.nanmean()

    def _add_tensors(self, preds: Any, target: Any) -> None:
        tasks = len(self.wrong)
        fits = isinstance(preds, Tensor) and isinstance(target, Tensor)
        if not fits or target.ndim != 2 or target.shape[1] != tasks:
            got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"`target` must be a tensor [n, {tasks}], a column a task, got {got}. Give names "
                "of `tasks` for mappings."
            )
        wrong, labelled = _counted(preds, target, self.missing)
        self.wrong = self.wrong + wrong.sum(0)
        self.count = self.count + labelled.sum(0)

    def _add_mappings(self, names: tuple[str, ...], preds: Any, target: Any) -> None:
        given = isinstance(preds, Mapping) and isinstance(target, Mapping)
        if not given or set(preds) != set(target) or not set(names) >= set(target):
            raise ValueError(
                f"`preds` and `target` must be mappings by the same of {list(names)}, got "
                f"{_keys(preds)} and {_keys(target)}."
            )
        wrong, count = self.wrong.clone(), self.count.clone()
        for task, labels in target.items():
            of_task, labelled = _counted(preds[task], labels, self.missing)
            wrong[names.index(task)] += of_task.sum()
            count[names.index(task)] += labelled.sum()
        self.wrong, self.count = wrong, count


def _keys(given: Any) -> list[str] | str:
    return sorted(given) if isinstance(given, Mapping) else type(given).__name__


def _counted(preds: Tensor, target: Tensor, missing: int | None) -> tuple[Tensor, Tensor]:
    """Which labels are wrong, and which are there."""
    labelled = torch.ones_like(target, dtype=torch.bool) if missing is None else target != missing
    return wrong_predictions(preds, target) & labelled, labelled
