"""The metrics of all tasks: a copy for every stage and every evaluation data loader."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_flatmtl.hosting.total import TotalLoss
from lightning_flatmtl.task import Task

__all__ = ["TaskMetrics", "log_name"]

_STAGES = ("train", "val", "test")
_EVALUATED = ("val", "test")


class TaskMetrics(nn.Module):
    """Finds and reads the metrics of the tasks.

    A module, so that the metrics move with the model. With several validation or test data loaders
    each has metrics of its own, which are made when its first batch comes.

    Args:
        tasks: The tasks.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.directions = {
            log_name(task.name, name): cast("bool", metric.higher_is_better)
            for task in tasks
            for name, metric in task.metrics.items()
        }
        """Whether higher is better, by ``"task/metric"``; ``None`` if the metric does not say."""
        self.collections = nn.ModuleDict(
            {_key(stage, 0): _collections(stage, tasks) for stage in _STAGES}
        )
        self._names = [task.name for task in tasks]
        totals = {_key(stage, 0): TotalLoss(self._names) for stage in _EVALUATED}
        self.totals = nn.ModuleDict(totals)

    def of_task(self, stage: str, loader: int, task: str) -> MetricCollection | None:
        """The metrics to feed, their names those to log under; ``None`` if the task has none."""
        if loader not in self._loaders(stage):
            copies = {name: c.clone() for name, c in self._by_task(stage, 0).items()}
            for collection in copies.values():
                collection.reset()
            # Made within an evaluation, whose end brings the older modules back to training only.
            self.collections[_key(stage, loader)] = nn.ModuleDict(copies).train()
        return self._by_task(stage, loader).get(task)

    def total(self, stage: str, loader: int, device: torch.device) -> TotalLoss:
        """The total loss of an evaluation data loader."""
        key = _key(stage, loader)
        if key not in self.totals:
            self.totals[key] = TotalLoss(self._names).to(device)
        return cast("TotalLoss", self.totals[key])

    def fed_loaders(self, stage: str, trainer: Trainer) -> list[int]:
        """The data loaders that have fed metrics in this epoch, in any process."""
        loaders = self._loaders(stage)
        return [i for i in loaders if any(_anywhere(trainer, list(self._fed(stage, i))))]

    def fed(self, stage: str, loader: int, trainer: Trainer) -> bool:
        """Whether all metrics have been fed in this epoch, each in some process."""
        return all(_anywhere(trainer, list(self._fed(stage, loader))))

    def values(self, stage: str, loader: int) -> dict[str, Tensor]:
        """All values by ``"task/metric"``, over all processes."""
        return {
            name.removeprefix(f"{stage}/"): value
            for collection in self._by_task(stage, loader).values()
            for name, value in collection.compute().items()
        }

    def _fed(self, stage: str, loader: int) -> Iterator[bool]:
        for collection in self._by_task(stage, loader).values():
            yield from (metric.update_called for metric in collection.values(copy_state=False))

    def _loaders(self, stage: str) -> list[int]:
        keys = [key.split("_") for key in self.collections]
        return [int(loader) for of, loader in keys if of == stage]

    def _by_task(self, stage: str, loader: int) -> dict[str, MetricCollection]:
        group = cast("nn.ModuleDict", self.collections[_key(stage, loader)])
        return cast("dict[str, MetricCollection]", dict(group.items()))


def _anywhere(trainer: Trainer, flags: list[bool]) -> list[bool]:
    """For each flag whether it is set in any process."""
    if trainer.world_size == 1 or not flags:
        return flags
    mine = torch.tensor(flags, dtype=torch.float32, device=trainer.strategy.root_device)
    summed = trainer.strategy.reduce(mine, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return [n > 0 for n in summed.tolist()]


def log_name(*parts: str) -> str:
    """``{stage}/{task}/{name}``, the one form of all logged names."""
    return "/".join(parts)


def _key(stage: str, loader: int) -> str:
    return f"{stage}_{loader}"


def _collections(stage: str, tasks: Sequence[Task]) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            task.name: MetricCollection(
                {name: metric.clone() for name, metric in task.metrics.items()},
                prefix=log_name(stage, task.name, ""),
            )
            for task in tasks
            if task.metrics
        }
    )
