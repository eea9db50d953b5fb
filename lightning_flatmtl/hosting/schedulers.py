"""Stepping learning-rate schedulers, which the Trainer leaves out in manual optimization."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as LightningReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["SchedulerCallable", "SchedulerStepper"]

SchedulerCallable = (
    Callable[[Optimizer], LightningReduceLROnPlateau] | Callable[[Optimizer], LRScheduler]
)
"""What makes a scheduler.

The command line tries the types in their order: Lightning's ``ReduceLROnPlateau``, which has a
``monitor``, is found by its short name before torch's of the same name, which is a LRScheduler.
"""

_METHOD = "configure_optimizers"
_DROPPED = ("monitor", "strict", "reduce_on_plateau")
"""What Lightning ignores, with a warning, in manual optimization; we keep it here."""


@dataclass(frozen=True)
class _Plateau:
    """What a scheduler looks at."""

    monitor: str
    strict: bool


class SchedulerStepper:
    """Steps the schedulers of ``configure_optimizers`` when automatic optimization would.

    By ``interval`` (``"step"``: with the optimizer; ``"epoch"``: after the last batch) and
    ``frequency``; a ``ReduceLROnPlateau`` after the metrics of its interval are there, on
    ``trainer.callback_metrics[monitor]``. What the module logs in its own ``on_train_epoch_end``
    comes too late for that.
    """

    def __init__(self) -> None:
        self._plateaus: dict[int, _Plateau] = {}  # by the identity of the scheduler
        self._replaced: dict[str, Any] | None = None  # what the module had before `capture`
        self._values: dict[str, float] = {}  # what was watched when the checkpoint was written

    def capture(self, module: LightningModule) -> None:
        """Read the monitors off the next call of ``module.configure_optimizers``.

        The method is replaced on the instance for that one call: whoever defines it, class,
        subclass, mix-in or LightningCLI, need not know of it.
        """
        self.release(module)
        self._values.clear()
        own = vars(module)
        self._replaced = {_METHOD: own[_METHOD]} if _METHOD in own else {}
        original = module.configure_optimizers

        def configure_optimizers() -> Any:
            self.release(module)
            return self._keep_monitors(original())

        own[_METHOD] = configure_optimizers

    def release(self, module: LightningModule) -> None:
        """Give the module its method back, if it still has ours."""
        if self._replaced is not None:
            vars(module).pop(_METHOD, None)
            vars(module).update(self._replaced)
            self._replaced = None

    def _keep_monitors(self, configuration: Any) -> Any:
        """Take out what Lightning would drop, in all the forms that it accepts."""
        self._plateaus.clear()
        if isinstance(configuration, dict):
            return self._keep_in_dict(configuration)
        if isinstance(configuration, list | tuple) and configuration:
            if all(isinstance(part, dict) for part in configuration):
                return [self._keep_in_dict(part) for part in configuration]
            if len(configuration) == 2 and isinstance(configuration[0], list):
                optimizers, schedulers = configuration
                entries = schedulers if isinstance(schedulers, list) else [schedulers]
                return optimizers, [self._keep(entry, None) for entry in entries]
        return configuration

    def _keep_in_dict(self, configuration: dict[str, Any]) -> dict[str, Any]:
        if "lr_scheduler" not in configuration:
            return configuration
        rest = {k: v for k, v in configuration.items() if k != "monitor"}
        entry = self._keep(configuration["lr_scheduler"], configuration.get("monitor"))
        return {**rest, "lr_scheduler": entry}

    def _keep(self, entry: Any, monitor: str | None) -> dict[str, Any]:
        given = entry if isinstance(entry, dict) else {"scheduler": entry}
        if given.get("interval", "epoch") not in {"step", "epoch"}:
            raise MisconfigurationException(
                "The `interval` of a learning-rate scheduler must be 'step' or 'epoch', got "
                f"{given['interval']!r}."
            )
        scheduler = given.get("scheduler")
        if given.get("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau)):
            monitor = given.get("monitor", monitor)
            if monitor is None:
                raise MisconfigurationException(
                    f"{type(scheduler).__name__} needs the name of a logged value to watch, got "
                    "none. Give it as `lr_scheduler_config={'monitor': 'val/loss'}`, or as "
                    "`monitor` in the dictionary that `configure_optimizers` returns."
                )
            self._plateaus[id(scheduler)] = _Plateau(monitor, given.get("strict", True))
        return {k: v for k, v in given.items() if k not in _DROPPED}

    def step(self, trainer: Trainer, interval: str, count: int, plateau: bool) -> None:
        """Step the schedulers of one kind.

        Args:
            trainer: The running Trainer.
            interval: ``"step"`` or ``"epoch"``.
            count: How many batches of the epoch, or epochs, there have been.
            plateau: Whether it is the turn of those that look at a metric, or of the others.
        """
        for config in trainer.lr_scheduler_configs:
            watched = self._plateaus.get(id(config.scheduler))
            if (watched is not None) is not plateau:
                continue
            if config.interval != interval or count % config.frequency != 0:
                continue
            if watched is None:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
            else:
                self._step_plateau(trainer, config.scheduler, watched)

    def watched_values(self, trainer: Trainer) -> dict[str, float]:
        """What plateau schedulers look at, for checkpoints.

        A run that resumes between a validation and the step after it has not measured them.
        """
        logged = trainer.callback_metrics
        monitors = {watched.monitor for watched in self._plateaus.values()}
        return {name: float(logged[name]) for name in sorted(monitors) if name in logged}

    def remember(self, values: dict[str, float]) -> None:
        """Look at the values of a checkpoint until there are others."""
        self._values = dict(values)

    def _step_plateau(self, trainer: Trainer, scheduler: Any, watched: _Plateau) -> None:
        logged = {**self._values, **trainer.callback_metrics}
        value = logged.get(watched.monitor)
        if value is not None:
            trainer.lightning_module.lr_scheduler_step(scheduler, value)
            return
        message = (
            f"{type(scheduler).__name__} watches '{watched.monitor}', which is not logged; logged "
            f"are {sorted(logged)}."
        )
        if watched.strict:
            raise MisconfigurationException(f"{message} Correct `monitor`.")
        rank_zero_warn(f"{message} The learning rate stays.", category=RuntimeWarning)
