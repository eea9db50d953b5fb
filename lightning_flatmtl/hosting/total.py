"""The sum of the task losses of an epoch: that of their means, whatever a batch lacks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TotalLoss"]


class TotalLoss(Metric):
    """The sum over the tasks of the mean of each one's loss over its samples.

    Args:
        tasks: The tasks; others are added when they come.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, tasks: Iterable[str]) -> None:
        super().__init__()
        self._tasks: list[str] = []
        for task in tasks:
            self._add(task)

    def _add(self, task: str) -> None:
        for state in ("sum", "count"):
            zero = torch.zeros((), device=self.device)
            self.add_state(f"{state}_{task}", zero, dist_reduce_fx="sum")
        self._tasks.append(task)

    def update(
        self, losses: Mapping[str, Tensor], counts: Mapping[str, float], dtype: torch.dtype
    ) -> None:
        """Add the losses of a batch, each the mean over its count of samples.

        Args:
            losses: The losses of the tasks that the batch has.
            counts: Their samples.
            dtype: The type to sum up in, the same in all processes.
        """
        for task in losses:
            if task not in self._tasks:
                self._add(task)
        for task in self._tasks:
            for state in (f"sum_{task}", f"count_{task}"):
                setattr(self, state, getattr(self, state).to(dtype))
            if task in losses:
                summed = getattr(self, f"sum_{task}") + losses[task].to(dtype) * counts[task]
                setattr(self, f"sum_{task}", summed)
                setattr(self, f"count_{task}", getattr(self, f"count_{task}") + counts[task])

    def compute(self) -> Tensor:
        """The sum over the tasks that have had a sample; NaN if none has."""
        sums = torch.stack([getattr(self, f"sum_{task}") for task in self._tasks])
        counts = torch.stack([getattr(self, f"count_{task}") for task in self._tasks])
        means = torch.where(counts > 0, sums / counts, 0.0)
        return torch.where((counts > 0).any(), means.sum(), torch.nan)
