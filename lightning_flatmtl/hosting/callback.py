"""What an aggregator and a TaskSAM have in common: they look for the module to train."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatmtl.hosting.automatic import TakeOver
from lightning_flatmtl.hosting.fit import Fit
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.refusals import refuse_second

__all__ = ["MethodCallback"]


class MethodCallback(Callback):
    """A callback that says how the tasks of a module are trained.

    A :class:`~lightning_flatmtl.MultiTaskModule` asks its Trainer for such callbacks. Any other
    module with automatic optimization is taken over for the time of the fit, see
    :class:`~lightning_flatmtl.takeover.TakeOver`; the first of the callbacks sees to it.
    """

    role: Literal["Aggregator", "TaskSAM"]
    """A Trainer may have one callback of each."""

    _taken: TakeOver | None = None

    _fit: Fit | None = None
    """That of the module that is, or was, taken over."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_second(self.role, trainer)
        if stage != "fit":
            return
        self._fit = None
        if not isinstance(pl_module, Host) and self._leads(trainer):
            self._taken = TakeOver(trainer, pl_module)
            self._fit = self._taken.fit
            self._fit.begin(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._taken is not None:
            self._taken.declare_shared()
            self._taken.fit.streams.put_back(trainer, pl_module)

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._taken is not None:
            self._taken.before_zero_grad()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._taken is not None:
            self._taken.after_backward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # At the end of the epoch the first process may already be in its progress bar's metrics,
        # which wait for the others too.
        if trainer.is_last_batch:
            self._exchange_streams(pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._taken is not None:
            self._taken.fit.after_epoch(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange_streams(pl_module)

    def _exchange_streams(self, pl_module: LightningModule) -> None:
        if self._taken is not None:
            self._taken.fit.exchange_streams(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._fit is not None:
            self._fit.save(pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._fit is not None:
            self._fit.load(pl_module, checkpoint)

    def _leads(self, trainer: Trainer) -> bool:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next(c for c in callbacks if isinstance(c, MethodCallback)) is self

    def _give_back(self) -> None:
        if self._taken is not None:
            self._taken.give_back()
            self._taken = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has taken nothing over, and is no part of the module whose `log` Lightning lends.
        own = ("_taken", "_fit", "log", "log_dict")
        return {k: v for k, v in vars(self).items() if k not in own}
