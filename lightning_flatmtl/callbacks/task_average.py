"""The mean over the tasks of a metric that all of them have, to choose epochs by."""

from collections.abc import Sequence
from typing import cast, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.names import nearest
from lightning_flatmtl.hosting.task_metrics import log_name
from lightning_flatmtl.module import MultiTaskModule

__all__ = ["TaskAverage"]


@final
class TaskAverage(Callback):
    r"""Logs the mean of a metric over all tasks, as ``val/average/{metric}``; it only looks.

    For ``ModelCheckpoint(monitor="val/average/error_rate")``, ``EarlyStopping`` and a comparison's
    ``select``: the published experiments on CelebA keep the epoch of the best mean over forty
    attributes, which is not the epoch of the smallest ``val/loss``. The values are those of the
    whole epoch and of all processes. A task that has no value in an epoch (NaN) is left out. Of
    several data loaders each has its own, ``val/average/{metric}/dataloader_idx_0`` and so on.

    Not supported: a LightningModule that is no :class:`~lightning_flatmtl.MultiTaskModule`.

    Args:
        metrics: The names of metrics that every task has; by default all such.

    Raises:
        MisconfigurationException: Before the first batch, if the module is no MultiTaskModule, or
            a task lacks the metric.

    Example:
        >>> from lightning_flatmtl.callbacks import TaskAverage
        >>> callbacks = [TaskAverage(["error_rate"])]
    """

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        self.metrics = None if metrics is None else list(metrics)
        self._names: list[str] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, MultiTaskModule):
            raise MisconfigurationException(
                f"TaskAverage needs a MultiTaskModule, got {type(pl_module).__name__}. Log the "
                "mean of your metrics in `on_validation_epoch_end` instead."
            )
        of_tasks = [list(task.metrics) for task in pl_module.tasks]
        shared = [name for name in of_tasks[0] if all(name in of for of in of_tasks)]
        for name in self.metrics or ():
            if name not in shared:
                raise MisconfigurationException(
                    f"`metrics` of TaskAverage must be metrics that every task has, got {name!r}. "
                    f"{nearest(name, shared)}All tasks have: {', '.join(shared) or 'none'}."
                )
        self._names = shared if self.metrics is None else self.metrics

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        host = cast("Host", pl_module)
        loaders = host.task_metrics.fed_loaders("val", trainer)
        for loader in loaders:
            values = host.task_metrics.values("val", loader)
            suffix = f"/dataloader_idx_{loader}" if len(loaders) > 1 else ""
            for name in self._names:
                of_tasks = [values[log_name(task.name, name)].double() for task in host.tasks]
                mean = torch.stack(of_tasks).nanmean()
                pl_module.log(f"val/average/{name}{suffix}", mean, add_dataloader_idx=False)
