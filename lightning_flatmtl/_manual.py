"""What the Trainer leaves out in manual optimization: accumulation, clipping, schedulers."""

import math
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatmtl._schedulers import SchedulerStepper

__all__ = ["ManualOptimization"]


class ManualOptimization(Callback):
    """Turns a loss into an optimizer step as automatic optimization would.

    A module returns it from ``configure_callbacks``; as a callback it keeps working when the module
    overrides hooks.

    Args:
        gradient_clip_val: Bound of the gradient, in ``[0, inf)``; ``None`` for no clipping.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: Batches per optimizer step, at least 1.

    Raises:
        ValueError: If an argument is out of its bounds.
    """

    def __init__(
        self,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: str,
        accumulate_grad_batches: int,
    ) -> None:
        if gradient_clip_val is not None and not 0 <= gradient_clip_val < math.inf:
            raise ValueError(f"`gradient_clip_val` must be in [0, inf), got {gradient_clip_val}.")
        if gradient_clip_algorithm not in {"norm", "value"}:
            raise ValueError(
                f"`gradient_clip_algorithm` must be 'norm' or 'value', got "
                f"{gradient_clip_algorithm!r}."
            )
        if not isinstance(accumulate_grad_batches, int) or accumulate_grad_batches < 1:
            raise ValueError(
                f"`accumulate_grad_batches` must be an integer >= 1, got "
                f"{accumulate_grad_batches!r}."
            )
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self._schedulers = SchedulerStepper()
        self._pending = False

    def optimize(self, module: LightningModule, loss: Tensor | None, batch_idx: int) -> None:
        """Differentiate ``loss`` and, at the end of a group of batches, step.

        Args:
            module: The module in training.
            loss: The scalar to differentiate; ``None`` for a batch that has nothing to say.
            batch_idx: The batch's index in the epoch.
        """
        optimizer = module.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if loss is not None:
            if not self._pending:
                optimizer.zero_grad()
            # A short last group is divided by the full number too, as in automatic optimization.
            share = self.accumulate_grad_batches
            module.manual_backward(loss if share == 1 else loss / share)
            self._pending = True
        trainer = module.trainer
        count = batch_idx + 1
        if count % self.accumulate_grad_batches == 0 or trainer.is_last_batch:
            if self._pending:
                optimizer.step()
                self._pending = False
            self._schedulers.step(trainer, "step", count, plateau=False)
        if trainer.is_last_batch:
            self._schedulers.step(trainer, "epoch", trainer.current_epoch + 1, plateau=False)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._pending = False
            self._schedulers.capture(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} expects one optimizer from `configure_optimizers`, "
                f"got {len(trainer.optimizers)}. Use one optimizer with a parameter group for each "
                "part of the model."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # The one place that is after unscaling and before the step in every precision.
        if self.gradient_clip_val is not None:
            pl_module.configure_gradient_clipping(
                optimizer, self.gradient_clip_val, self.gradient_clip_algorithm
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._schedulers.step(trainer, "step", batch_idx + 1, plateau=True)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedulers.step(trainer, "epoch", trainer.current_epoch + 1, plateau=True)
