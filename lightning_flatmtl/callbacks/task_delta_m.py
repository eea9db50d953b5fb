"""Delta_m task by task: who gains from training together, and who pays."""

from typing import cast, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.functional.delta_m import delta_m_by_task
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.task_metrics import log_name
from lightning_flatmtl.module import MultiTaskModule

__all__ = ["TaskDeltaM"]


@final
class TaskDeltaM(Callback):
    r"""Logs Delta_m of every task, as ``val/{task}/delta_m`` and ``test/{task}/delta_m``.

    ``{stage}/delta_m``, which the module logs, is the mean over all metrics; a task that is harmed
    (negative transfer) may hide in it. The values are those of the whole epoch and of all
    processes, in percent, positive is better than the baseline. Of several data loaders each has
    its own, ``val/{task}/delta_m/dataloader_idx_0`` and so on. An epoch that lacks a task has none.

    Not supported: a LightningModule that is no :class:`~lightning_flatmtl.MultiTaskModule`.

    Raises:
        MisconfigurationException: Before the first batch, if the module is no MultiTaskModule or
            has no baselines.

    Example:
        >>> from lightning_flatmtl.callbacks import TaskDeltaM
        >>> callbacks = [TaskDeltaM()]
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, MultiTaskModule):
            raise MisconfigurationException(
                f"TaskDeltaM needs a MultiTaskModule, got {type(pl_module).__name__}. Call "
                "`lightning_flatmtl.metrics.delta_m_by_task` on your metrics instead."
            )
        if pl_module.baselines is None:
            raise MisconfigurationException(
                "TaskDeltaM needs values to compare with, got a module without `baselines`. Pass "
                '`MultiTaskModule(baselines={"task/metric": value, ...})`; `flatmtl baselines` '
                "measures them."
            )

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        host = cast("Host", pl_module)
        assert host.baselines is not None
        metrics = host.task_metrics
        loaders = metrics.fed_loaders(stage, trainer)
        for loader in loaders:
            if not metrics.fed(stage, loader, trainer):
                continue
            suffix = f"/dataloader_idx_{loader}" if len(loaders) > 1 else ""
            values = metrics.values(stage, loader)
            found = delta_m_by_task(values, host.baselines, metrics.directions)
            for task, value in found.items():
                name = log_name(stage, task, f"delta_m{suffix}")
                pl_module.log(name, value, add_dataloader_idx=False)
