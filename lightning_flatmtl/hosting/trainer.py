"""What is read off a Trainer: its method, its processes, its loss scale, its parameters."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatmtl.engine import Sharpness
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.distributed import DataParallel, Sharded
from lightning_flatmtl.engine.processes.single import SingleProcess
from lightning_flatmtl.hosting.flatness_schedule import FlatnessSchedule

__all__ = [
    "aggregator_of",
    "kinds_of",
    "loss_scale",
    "of_role",
    "optimized",
    "processes_of",
    "schedule_of",
    "sharpness_of",
]

WHOLE, SHARDING = "DDPStrategy", "ModelParallelStrategy"
"""The strategies under which several processes train with whole parameters, and with parts."""


def of_role(trainer: Trainer, role: str) -> list[Any]:
    """The callbacks of the Trainer that have a role."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if getattr(c, "role", None) == role]


def aggregator_of(trainer: Trainer) -> Any:
    """The aggregator among the Trainer's callbacks, ``None`` if there is none."""
    return next(iter(of_role(trainer, "Aggregator")), None)


def sharpness_of(trainer: Trainer) -> Sharpness | None:
    """The settings of the TaskSAM among the Trainer's callbacks, ``None`` if there is none."""
    return next((c.sharpness for c in of_role(trainer, "TaskSAM")), None)


def schedule_of(trainer: Trainer) -> FlatnessSchedule:
    """When the TaskSAM among the Trainer's callbacks is at work; always, if there is none."""
    schedules = (c.schedule for c in of_role(trainer, "TaskSAM"))
    return next(schedules, FlatnessSchedule())


def loss_scale(trainer: Trainer, module: LightningModule) -> Tensor | None:
    """The scale of the Trainer's GradScaler, ``None`` without one; it stays on the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=module.device))
    return scale


def optimized(trainer: Trainer) -> list[Tensor]:
    """What the Trainer's optimizers train, parameters that the module does not know among it."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return [p for group in groups for p in group["params"]]


def processes_of(trainer: Trainer) -> Processes:
    """The processes that share the steps of the Trainer; to be closed after the fit.

    Under other strategies, which no method can be trained with, every process is left alone: the
    plain sum of the losses is then what Lightning makes of it.
    """
    kinds = kinds_of(trainer)
    if trainer.world_size == 1 or not kinds & {WHOLE, SHARDING}:
        return SingleProcess()
    return Sharded() if SHARDING in kinds else DataParallel()


def kinds_of(trainer: Trainer) -> set[str]:
    """The names of the strategy's classes, those of either of Lightning's two packages."""
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    # DeepSpeed's is derived from DDPStrategy and shares nothing with it.
    return kinds - {WHOLE} if "DeepSpeedStrategy" in kinds else kinds
