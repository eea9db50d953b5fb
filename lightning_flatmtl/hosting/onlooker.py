"""Looks at the task gradients of an existing module that no method has taken over."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_flatmtl.engine import MultiTaskStep, NonFiniteError, StepResult, WholePasses
from lightning_flatmtl.hosting.automatic import count_of, declared_by, second_pass, task_losses
from lightning_flatmtl.hosting.trainer import loss_scale, optimized, processes_of

__all__ = ["Onlooker"]


class Onlooker:
    """Differentiates the losses that a module's ``training_step`` returns, and nothing more.

    What the module returns, its graph included, is passed on as it is.

    Args:
        trainer: The Trainer of the fit.
        module: The module, with automatic optimization.

    Raises:
        MisconfigurationException: If the module optimizes by hand.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        name = type(module).__name__
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"Without an aggregator or TaskSAM the gradients of tasks can be looked at in a "
                f"MultiTaskModule or with automatic optimization, got {name} with "
                "`automatic_optimization = False`. Remove the callback, or derive the module from "
                "lightning_flatmtl.MultiTaskModule and override `losses`."
            )
        self._trainer, self._module = trainer, module
        self.engine = MultiTaskStep(processes=processes_of(trainer))
        self.engine.watched = True
        self.last_step: StepResult | None = None
        self._lent = False
        self._own: Any = None

    def begin(self) -> None:
        """Be there for the next ``training_step``."""
        module = self._module
        self._own = vars(module).get("training_step")
        original = module.training_step

        @wraps(original)
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            if second_pass(module):  # another callback looks, before the step
                return original(*args, **kwargs)
            self.end()  # a further run of the same batch is not looked at
            outputs = original(*args, **kwargs)
            self._look(outputs)
            return outputs

        self.last_step = None
        self._lent = True
        module.training_step = looked_at  # type: ignore[method-assign]

    def end(self) -> None:
        """Be gone."""
        if self._lent:
            self._lent = False
            del self._module.training_step
            if self._own is not None:
                self._module.training_step = self._own  # type: ignore[method-assign]

    def close(self) -> None:
        """Give memory and processes back."""
        self.end()
        self.engine.processes.close()

    def _look(self, outputs: Any) -> None:
        module, trainer = self._module, self._trainer
        losses = task_losses(outputs, "To look at the gradients of tasks")
        self._declare(losses)
        passes = WholePasses(lambda: losses, module, count=lambda task: count_of(outputs, task))
        scale, trained = loss_scale(trainer, module), optimized(trainer)
        try:
            result = self.engine(
                module, passes, scale=scale, last=trainer.is_last_batch, optimized=trained
            )
        except NonFiniteError:  # for others to speak of: plain training goes on
            return
        self.last_step = None if result is None else result.detached()

    def _declare(self, losses: Mapping[str, Any]) -> None:
        """What the module says of its parameters, as where a method trains it."""
        partition, module = self.engine.partition, self._module
        if not partition.seen:
            partition.declare(declared_by(module, "shared_parameters") or (), None)
        for task in losses if hasattr(module, "task_parameters") else ():
            if task not in partition.seen:
                found = declared_by(module, "task_parameters", task) or ()
                partition.declare(None, {task: found})
