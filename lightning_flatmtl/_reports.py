"""What a MultiTaskModule does around its batches: begin a fit, close epochs, keep findings."""

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl._compile import CompiledParts, SeveralBackwards
from lightning_flatmtl._host import (
    refuse_unfit_gradients,
    refuse_unfit_trainer,
    warn_of_lost_scale,
)

if TYPE_CHECKING:
    from lightning_flatmtl.module import MultiTaskModule

__all__ = ["EpochReports"]

_KEY = "lightning_flatmtl.partition"


class EpochReports(Callback):
    """Relative improvement and absent tasks at the end of epochs; the partition in checkpoints.

    A callback, so that it keeps working when the module overrides hooks.
    """

    def __init__(self) -> None:
        self._borrowed: list[SeveralBackwards | CompiledParts] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = _typed(pl_module)
        module.start_fit()
        if module.has_method:
            refuse_unfit_trainer(trainer)
            refuse_unfit_gradients(module.gradients, module.sharpness)
            warn_of_lost_scale(module.aggregator, module.sharpness)
            self._borrowed = [SeveralBackwards()]
        self._borrowed.append(CompiledParts(pl_module, module.compilable))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _typed(pl_module).declare_partition()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._give_back()
            _typed(pl_module).end_fit()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        while self._borrowed:
            self._borrowed.pop().release()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _typed(pl_module)
        module.watch.after_epoch(module.engine.partition, module, _whole_epoch(trainer))
        skipped = module.watch.take_skipped()
        if skipped:
            module.log("train/skipped_batches", float(skipped))
        self._log_improvement(pl_module, "train")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_improvement(pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_improvement(pl_module, "test")

    def _log_improvement(self, pl_module: LightningModule, stage: str) -> None:
        module = _typed(pl_module)
        loaders = module.task_metrics.fed_loaders(stage, pl_module.trainer)
        for loader in loaders:
            value = module.relative_improvement(stage, loader)
            # The hook is that of all loaders; Lightning names them in the steps only.
            suffix = f"/dataloader_idx_{loader}" if len(loaders) > 1 else ""
            if value is not None:
                module.log(f"{stage}/delta_m{suffix}", value, add_dataloader_idx=False)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        named = dict(pl_module.named_parameters())
        checkpoint[_KEY] = _typed(pl_module).engine.partition.state_dict(named)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _KEY in checkpoint:
            named = dict(pl_module.named_parameters())
            _typed(pl_module).engine.partition.load_state_dict(checkpoint[_KEY], named)


def _typed(module: LightningModule) -> "MultiTaskModule":
    return cast("MultiTaskModule", module)


def _whole_epoch(trainer: Trainer) -> bool:
    """Whether the epoch that ends has gone through all of the training data."""
    limit = trainer.limit_train_batches
    return trainer.is_last_batch and isinstance(limit, float) and limit == 1.0
