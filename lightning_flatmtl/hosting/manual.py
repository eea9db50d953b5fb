"""What the Trainer leaves out in manual optimization: accumulation, clipping, schedulers."""

import math
import warnings
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_flatmtl.engine import StepResult
from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.gradients.accumulation import Place
from lightning_flatmtl.hosting.buffers import share_buffers
from lightning_flatmtl.hosting.refusals import refuse_unfit_callbacks
from lightning_flatmtl.hosting.schedulers import SchedulerStepper
from lightning_flatmtl.hosting.untouched import UntouchedGradients

__all__ = ["ManualOptimization"]

_KEY = "lightning_flatmtl.plateaus"


class ManualOptimization(Callback):
    """Turns a loss into an optimizer step as automatic optimization would.

    A module returns it from ``configure_callbacks``; as a callback it keeps working when the module
    overrides hooks. The hooks that automatic optimization calls around a step are called here:
    ``on_before_zero_grad``, ``optimizer_zero_grad``, ``optimizer_step`` and
    ``configure_gradient_clipping``. The closure that ``optimizer_step`` is given does nothing,
    since the gradients are there already.

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
        self._in_fit = False
        self._untouched = UntouchedGradients()
        self._forget()

    def _forget(self) -> None:
        self._has_run = False  # whether `optimize` was called in this fit
        self._pending = False  # the present group has batches that no step has used yet
        self._unused_batch: int | None = None  # one that has begun and has not come to `optimize`
        self._plateaus_due: int | None = None  # batch after which plateau schedulers are to look

    def place(self, trainer: Trainer, batch_idx: int) -> Place:
        """The place of a batch among those that make one update."""
        return Place(self._opens_group(batch_idx), self._closes_group(trainer, batch_idx))

    def optimize(
        self,
        module: LightningModule,
        result: StepResult | None,
        batch_idx: int,
        accumulated: bool = False,
    ) -> None:
        """Differentiate the loss of a step and, at the end of a group of batches, update.

        Args:
            module: The module in training.
            result: What the engine found; ``None`` for a batch that has nothing to say.
            batch_idx: The batch's index in the epoch.
            accumulated: Whether the engine accumulates, so that the last batch of a group brings
                the loss of all; else their losses are averaged here.
        """
        if not self._in_fit:
            raise MisconfigurationException(
                f"The callbacks of {type(module).__name__} expect to be in the Trainer, but "
                "`configure_callbacks` has left them out. Return "
                "`[*super().configure_callbacks(), ...]` there."
            )
        # `training_step` runs under autocast; in automatic optimization what follows does not.
        with outside_autocast(module.device):
            self._optimize(module, result, batch_idx, accumulated)

    def _optimize(
        self,
        module: LightningModule,
        result: StepResult | None,
        batch_idx: int,
        accumulated: bool,
    ) -> None:
        trainer = module.trainer
        optimizer = module.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self._unused_batch = None
        self._has_run = True
        if self._opens_group(batch_idx):
            self._zero_grad(trainer, module, optimizer, batch_idx)
        if result is not None:
            self._pending = True
        if result is not None and result.loss is not None:
            # A short last group is divided by the full number too, as in automatic optimization.
            share = self.accumulate_grad_batches
            batches = batch_idx % share + 1 if accumulated else 1
            loss = result.loss if batches == share else result.loss * (batches / share)
            module.manual_backward(loss)
            self._untouched.after_backward(module.parameters(), result.untouched)
        share_buffers(trainer, module)
        if self._closes_group(trainer, batch_idx):
            if self._pending:
                module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, _nothing)
                self._pending = False
            self._schedulers.step(trainer, "step", batch_idx + 1, plateau=False)
        if trainer.is_last_batch:
            self._schedulers.step(trainer, "epoch", trainer.current_epoch + 1, plateau=False)

    def _zero_grad(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: LightningOptimizer,
        batch_idx: int,
    ) -> None:
        self._pending = False
        self._untouched.begin()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_before_zero_grad(trainer, module, optimizer.optimizer)
        module.on_before_zero_grad(optimizer.optimizer)
        module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer.optimizer)

    def _opens_group(self, batch_idx: int) -> bool:
        # A group that was broken off, by the end of an epoch that was cut short, is forgotten.
        return not self._pending or batch_idx % self.accumulate_grad_batches == 0

    def _closes_group(self, trainer: Trainer, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.accumulate_grad_batches == 0 or trainer.is_last_batch

    def refuse_trainer_settings(self, trainer: Trainer, owner: str) -> None:
        """Say where the settings go that the Trainer takes in automatic optimization only.

        Lightning refuses them too, a moment later, but its way out is automatic optimization.

        Raises:
            MisconfigurationException: If the Trainer has one of them.
        """
        for name, neutral in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
            value = getattr(trainer, name)
            if value not in neutral:
                raise MisconfigurationException(
                    f"{owner} expects `{name}` as an argument of its own, got "
                    f"Trainer({name}={value}). Write {owner}(..., {name}={value}) instead."
                )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_unfit_callbacks(trainer)
        self._in_fit = True
        self._forget()
        self._schedulers.capture(pl_module)
        # Loggers and `estimated_stepping_batches` count in updates and ask the Trainer.
        trainer.accumulate_grad_batches = self.accumulate_grad_batches
        # The advice that comes with it, to keep the weights from before the step, is not for us.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._give_back(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back(trainer, pl_module)

    def _give_back(self, trainer: Trainer, module: LightningModule) -> None:
        self._in_fit = False
        self._schedulers.release(module)
        trainer.accumulate_grad_batches = 1

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = {
            "watched": self._schedulers.watched_values(trainer),
            "due": self._plateaus_due,
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _KEY in checkpoint:
            self._schedulers.remember(checkpoint[_KEY]["watched"])
            self._plateaus_due = checkpoint[_KEY]["due"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} expects one optimizer from `configure_optimizers`, "
                f"got {len(trainer.optimizers)}. Use one optimizer with a parameter group for each "
                "part of the model."
            )
        if isinstance(trainer.optimizers[0], LBFGS):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} expects an optimizer that takes one gradient a step, "
                "got LBFGS. Use another, for example Adam."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # The one place that is after unscaling and before the step in every precision. Also without
        # a bound: an override of `configure_gradient_clipping` may bring its own.
        pl_module.configure_gradient_clipping(
            optimizer,
            self.gradient_clip_val,
            None if self.gradient_clip_val is None else self.gradient_clip_algorithm,
        )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_due_plateaus(trainer)
        self._unused_batch = batch_idx

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._has_run:
            name = type(pl_module).__name__
            raise MisconfigurationException(
                f"Expected {name}.training_step to run the step of MultiTaskModule, got one that "
                "returned without it, so nothing is trained. Override `losses`, or `encode` and "
                "`task_loss`, instead, or call `super().training_step(batch, batch_idx)`."
            )
        if self._closes_group(trainer, batch_idx):
            self._plateaus_due = batch_idx + 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_due_plateaus(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_due_plateaus(trainer)
        if not trainer.is_last_batch:  # stopped in the middle of the epoch
            return
        if self._unused_batch is not None:  # `on_train_batch_start` has skipped the rest
            self._schedulers.step(trainer, "step", self._unused_batch + 1, plateau=False)
            self._schedulers.step(trainer, "epoch", trainer.current_epoch + 1, plateau=False)
        self._schedulers.step(trainer, "epoch", trainer.current_epoch + 1, plateau=True)

    def _step_due_plateaus(self, trainer: Trainer) -> None:
        """Step what looks at a metric every few batches.

        After the validation that may follow a batch, and at the latest before the next batch. (A
        LearningRateMonitor, which comes first there, shows the new rate one batch late.)
        """
        due, self._plateaus_due = self._plateaus_due, None
        if due is not None:
            self._schedulers.step(trainer, "step", due, plateau=True)


def _nothing() -> None:
    """The closure of a step whose gradients are there already."""
