"""What a MultiTaskModule does around its batches: begin a fit, close epochs, keep findings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.hosting.compiling import CompiledParts, SeveralBackwards
from lightning_flatmtl.hosting.random_streams import RandomStreams
from lightning_flatmtl.hosting.refusals import (
    refuse_unfit_gradients,
    refuse_unfit_trainer,
    warn_of_lost_scale,
)

if TYPE_CHECKING:
    from lightning_flatmtl.module import MultiTaskModule

__all__ = ["FitReports"]

_KEY = "lightning_flatmtl.partition"


class FitReports(Callback):
    """Relative improvement and absent tasks at the end of epochs; the partition in checkpoints.

    A callback, so that it keeps working when the module overrides hooks.
    """

    def __init__(self) -> None:
        self._borrowed: list[SeveralBackwards | CompiledParts] = []
        self._of_training: dict[str, float] = {}
        self._streams = RandomStreams()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = _typed(pl_module)
        module.start_fit()
        self._streams.begin()
        if module.has_method:
            refuse_unfit_trainer(trainer)
            refuse_unfit_gradients(module.gradients, module.sharpness, module.batches_per_update)
            warn_of_lost_scale(module.aggregator, module.sharpness)
            self._borrowed = [SeveralBackwards()]
        self._borrowed.append(CompiledParts(pl_module, module.compilable))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _typed(pl_module).declare_partition()
        self._streams.put_back(trainer, pl_module)

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
        _typed(pl_module).end_fit()

    def _give_back(self) -> None:
        while self._borrowed:
            self._borrowed.pop().release()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _typed(pl_module)
        module.watch.after_epoch(module.engine.partition, module, _whole_epoch(trainer))
        for name, count in module.watch.epoch_counts().items():
            module.log(name, count)
        if trainer.world_size == 1:
            self._of_training = self._improvements(pl_module, "train")
        self._log(pl_module, self._of_training)
        self._of_training = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Several processes come together here: at the end of the epoch the first of them may
        # already be in the metrics of its progress bar.
        if trainer.world_size > 1 and trainer.is_last_batch:
            self._of_training = self._improvements(pl_module, "train")
            self._streams.exchange(trainer, pl_module, _typed(pl_module).engine.processes)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, self._improvements(pl_module, "val"))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._streams.exchange(trainer, pl_module, _typed(pl_module).engine.processes)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, self._improvements(pl_module, "test"))

    def _improvements(self, pl_module: LightningModule, stage: str) -> dict[str, float]:
        """Delta_m of an epoch by the name to log it under; empty without baselines."""
        module = _typed(pl_module)
        if module.baselines is None:
            return {}
        loaders = module.task_metrics.fed_loaders(stage, pl_module.trainer)
        found = {}
        for loader in loaders:
            value = module.relative_improvement(stage, loader)
            # The hook is that of all loaders; Lightning names them in the steps only.
            suffix = f"/dataloader_idx_{loader}" if len(loaders) > 1 else ""
            if value is not None:
                found[f"{stage}/delta_m{suffix}"] = value
        return found

    def _log(self, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            pl_module.log(name, value, add_dataloader_idx=False)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        named = dict(pl_module.named_parameters())
        checkpoint[_KEY] = _typed(pl_module).engine.partition.state_dict(named)
        self._streams.save(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._streams.load(trainer, pl_module, checkpoint)
        if _KEY in checkpoint:
            named = dict(pl_module.named_parameters())
            _typed(pl_module).engine.partition.load_state_dict(checkpoint[_KEY], named)


def _typed(module: LightningModule) -> "MultiTaskModule":
    return cast("MultiTaskModule", module)


def _whole_epoch(trainer: Trainer) -> bool:
    """Whether the epoch that ends has gone through all of the training data."""
    limit = trainer.limit_train_batches
    return trainer.is_last_batch and isinstance(limit, float) and limit == 1.0
