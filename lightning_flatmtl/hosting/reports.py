"""What a MultiTaskModule does around its batches: begin a fit, close epochs, keep findings."""

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.hosting.compiling import CompiledParts
from lightning_flatmtl.hosting.fit import Fit
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.thawing import ThawedInParallel

__all__ = ["FitReports"]


class FitReports(Callback):
    """Begins and ends a fit; relative improvement and absent tasks at the end of epochs.

    A callback, so that it keeps working when the module overrides hooks.
    """

    def __init__(self) -> None:
        self._compiled: CompiledParts | None = None
        self._thawed = ThawedInParallel()
        self._of_training: dict[str, float] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        host = _host(pl_module)
        host.start_fit(trainer).begin(trainer)
        self._compiled = CompiledParts(pl_module, host.compilable)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _host(pl_module).declare_partition()
        _fit(pl_module).streams.put_back(trainer, pl_module)
        self._thawed.begin(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end(pl_module)

    def _end(self, pl_module: LightningModule) -> None:
        if self._compiled is not None:
            self._compiled.release()
            self._compiled = None
        _fit(pl_module).close()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _fit(pl_module).after_epoch(pl_module, _whole_epoch(trainer))
        if trainer.world_size == 1:
            self._of_training = self._improvements(pl_module, "train")
        self._log(pl_module, self._of_training)
        self._of_training = {}

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._thawed.before_batch(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Several processes come together here: at the end of the epoch the first of them may
        # already be in the metrics of its progress bar.
        if trainer.world_size > 1 and trainer.is_last_batch:
            self._of_training = self._improvements(pl_module, "train")
            _fit(pl_module).exchange_streams(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, self._improvements(pl_module, "val"))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _fit(pl_module).exchange_streams(pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, self._improvements(pl_module, "test"))

    def _improvements(self, pl_module: LightningModule, stage: str) -> dict[str, float]:
        """Delta_m of an epoch by the name to log it under; empty without baselines."""
        module = _host(pl_module)
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
        _fit(pl_module).save(pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _fit(pl_module).load(pl_module, checkpoint)


def _host(module: LightningModule) -> Host:
    return cast(Host, module)


def _fit(module: LightningModule) -> Fit:
    return _host(module)._fit


def _whole_epoch(trainer: Trainer) -> bool:
    """Whether the epoch that ends has gone through all of the training data."""
    limit = trainer.limit_train_batches
    return trainer.is_last_batch and isinstance(limit, float) and limit == 1.0
