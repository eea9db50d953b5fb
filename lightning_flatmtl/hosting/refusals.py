"""Which company the callbacks of a method accept; asked before the first batch."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatmtl.engine import Sharpness
from lightning_flatmtl.hosting.trainer import SHARDING, WHOLE, kinds_of, of_role

__all__ = [
    "refuse_second",
    "refuse_unfit_callbacks",
    "refuse_unfit_for_gram",
    "refuse_unfit_gradients",
    "refuse_unfit_trainer",
    "warn_of_lost_scale",
]


def refuse_second(role: str, trainer: Trainer) -> None:
    """Refuse a second callback of the same role in one Trainer."""
    found = of_role(trainer, role)
    if len(found) > 1:
        names = ", ".join(type(c).__name__ for c in found)
        raise MisconfigurationException(
            f"Expected at most one {role} in the Trainer's callbacks, got {len(found)}: {names}. "
            "Keep one of them."
        )


def refuse_unfit_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks of Lightning that do something else, silently, in manual optimization."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging trains the averaged weights for another epoch in manual "
                "optimization. Use lightning.pytorch.callbacks.WeightAveraging instead."
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise MisconfigurationException(
                "GradientAccumulationScheduler does nothing in manual optimization. Use "
                "MultiTaskModule(accumulate_grad_batches=...) instead."
            )
        # Lightning shows this setting in the callback's state key only.
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) saves nothing in manual optimization. "
                "Use `every_n_train_steps` or `every_n_epochs` instead."
            )


def refuse_unfit_trainer(trainer: Trainer) -> None:
    """Refuse strategies under which an aggregator or TaskSAM would not be exact."""
    if not kinds_of(trainer) & {"SingleDeviceStrategy", WHOLE, SHARDING}:
        raise MisconfigurationException(
            f"Expected one device or data-parallel training (strategy='ddp') with an aggregator or "
            f"TaskSAM, got {type(trainer.strategy).__name__}, which hides the gradients of single "
            "tasks. Use Trainer(strategy='ddp'), or ModelParallelStrategy for a model that "
            "outgrows a device."
        )
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            "Expected parameters sharded over data-parallel processes with an aggregator or "
            f"TaskSAM, got tensor parallelism over {mesh['tensor_parallel'].size()} devices. Use "
            f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, "
            "tensor_parallel_size=1)."
        )


def refuse_unfit_gradients(gradients: str, sharpness: Sharpness | None, share: int) -> None:
    """Refuse a task Jacobian at the features where one at the parameters is needed.

    Args:
        gradients: Where it is taken.
        sharpness: The settings of the TaskSAM.
        share: How many batches make an update.
    """
    if gradients == "features" and share > 1:
        raise MisconfigurationException(
            "With MultiTaskModule(gradients='features') an aggregator needs "
            f"accumulate_grad_batches=1, got {share}: every batch has features of its own. Use "
            "larger batches, or gradients='parameters'."
        )
    if gradients == "gram" and share > 1:
        raise MisconfigurationException(
            "With MultiTaskModule(gradients='gram') an aggregator needs accumulate_grad_batches=1, "
            f"got {share}: between batches the rows would have to be kept. Use larger batches, or "
            "gradients='parameters'."
        )
    if gradients != "parameters" and sharpness is not None and sharpness.active:
        why = "perturbs parameters" if gradients == "features" else "needs the task gradients"
        raise MisconfigurationException(
            f"TaskSAM {why} and needs MultiTaskModule(gradients='parameters'), got "
            f"{gradients!r}. Remove one of the two."
        )


def refuse_unfit_for_gram(aggregator: Any, processes: int) -> None:
    """Refuse what the Gram matrix alone is not enough for.

    Args:
        aggregator: The aggregator; ``None`` for none.
        processes: How many train together.
    """
    if aggregator is not None and aggregator.requires != "gram":
        raise MisconfigurationException(
            "With MultiTaskModule(gradients='gram') an aggregator must look at the inner products "
            f"of the task gradients only, got {type(aggregator).__name__}, which looks at the "
            "gradients. Use another aggregator, or gradients='parameters'."
        )
    if processes > 1:
        raise MisconfigurationException(
            f"MultiTaskModule(gradients='gram') is for one device, got {processes} processes: the "
            "inner products of summed gradients need the gradients. Use gradients='parameters'."
        )


def warn_of_lost_scale(aggregator: Any, sharpness: Sharpness | None) -> None:
    """Warn where loss part and flat part would be added without regard to their sizes."""
    if aggregator is None or sharpness is None or not sharpness.active:
        return
    if sharpness.splits and not aggregator.follows_scale:
        name = type(aggregator).__name__
        rank_zero_warn(
            f"The direction of {name} does not scale with the gradients, so with TaskSAM the flat "
            f"part counts as much as the loss part or more, however small rho is. Use "
            f"{name}(normalize=True).",
            category=UserWarning,
        )
