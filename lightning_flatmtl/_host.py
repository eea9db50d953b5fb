"""Which modules and which company our callbacks accept; asked before the first batch."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatmtl.engine import Sharpness

__all__ = [
    "Host",
    "refuse_foreign_module",
    "refuse_second",
    "refuse_unfit_callbacks",
    "refuse_unfit_gradients",
    "refuse_unfit_trainer",
    "warn_of_lost_scale",
]


class Host:
    """Marks the modules that run Algorithm 1 with the callbacks of their Trainer."""


def refuse_second(callback: Callback, kind: type[Callback], trainer: Trainer) -> None:
    """Refuse a second callback of the same kind in one Trainer."""
    found = [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]
    if len(found) > 1:
        names = ", ".join(type(c).__name__ for c in found)
        raise MisconfigurationException(
            f"Expected at most one {kind.__name__} in the Trainer's callbacks, got {len(found)}: "
            f"{names}. Keep one of them."
        )


def refuse_foreign_module(callback: Callback, module: LightningModule) -> None:
    """Refuse a module that this version cannot train."""
    if not isinstance(module, Host):
        raise MisconfigurationException(
            f"{type(callback).__name__} expects a MultiTaskModule, got {type(module).__name__}. "
            "Derive it from lightning_flatmtl.MultiTaskModule and override `losses`; taking over "
            "modules of other kinds is not supported by this version."
        )


def refuse_unfit_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks of Lightning that do something else, silently, in manual optimization."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging trains the averaged weights for another epoch in manual "
                "optimization. Use lightning.pytorch.callbacks.WeightAveraging instead."
            )
        # Lightning shows this setting in the callback's state key only.
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) saves nothing in manual optimization. "
                "Use `every_n_train_steps` or `every_n_epochs` instead."
            )


def refuse_unfit_trainer(trainer: Trainer) -> None:
    """Refuse where an aggregator or TaskSAM would not be exact in this version."""
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"Expected one process with an aggregator or TaskSAM, got {trainer.world_size}. This "
            "version aggregates on one device only: use Trainer(devices=1)."
        )
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        raise MisconfigurationException(
            "Expected a precision without loss scaling with an aggregator or TaskSAM, got "
            f"'{precision.precision}'. Use precision='bf16-mixed' or '32-true'."
        )


def refuse_unfit_gradients(gradients: str, sharpness: Sharpness | None) -> None:
    """Refuse a task Jacobian at the features where TaskSAM needs one at the parameters."""
    if gradients == "features" and sharpness is not None and sharpness.active:
        raise MisconfigurationException(
            "TaskSAM perturbs parameters and needs MultiTaskModule(gradients='parameters'), got "
            "'features'. Remove one of the two."
        )


def warn_of_lost_scale(aggregator: Any, sharpness: Sharpness | None) -> None:
    """Warn where loss part and flat part would be added without regard to their sizes."""
    if aggregator is None or sharpness is None or not sharpness.active:
        return
    if sharpness.aggregate == "split" and not aggregator.follows_scale:
        name = type(aggregator).__name__
        rank_zero_warn(
            f"The direction of {name} does not scale with the gradients, so with TaskSAM the flat "
            f"part counts as much as the loss part or more, however small rho is. Use "
            f"{name}(normalize=True).",
            category=UserWarning,
        )
