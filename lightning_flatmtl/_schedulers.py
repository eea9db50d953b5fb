"""Stepping learning-rate schedulers, which the Trainer leaves out in manual optimization."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["SchedulerStepper"]

_DROPPED = ("monitor", "strict", "reduce_on_plateau")
"""What Lightning ignores, with a warning, in manual optimization; we keep it here."""


@dataclass(frozen=True)
class _Watched:
    """What a scheduler looks at."""

    monitor: str | None
    strict: bool


class SchedulerStepper:
    """Steps the schedulers of ``configure_optimizers`` when automatic optimization would.

    By ``interval`` (``"step"``: with the optimizer; ``"epoch"``: after the last batch) and
    ``frequency``; a ``ReduceLROnPlateau`` after the metrics of its interval are there, on
    ``trainer.callback_metrics[monitor]``.
    """

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def capture(self, module: LightningModule) -> None:
        """Read the monitors off the next call of ``module.configure_optimizers``.

        The method is replaced on the instance for that one call: whoever defines it, class,
        subclass or mix-in, need not know of it.
        """
        original: Callable[[], Any] = module.configure_optimizers

        def configure_optimizers() -> Any:
            del module.configure_optimizers  # the class's method shows again
            return self._keep_monitors(original())

        module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def _keep_monitors(self, configuration: Any) -> Any:
        self._watched.clear()
        if isinstance(configuration, dict):
            if "lr_scheduler" not in configuration:
                return configuration
            entry = self._keep(configuration["lr_scheduler"], configuration.get("monitor"))
            rest = {k: v for k, v in configuration.items() if k != "monitor"}
            return {**rest, "lr_scheduler": entry}
        if isinstance(configuration, list | tuple) and len(configuration) == 2:
            optimizers, schedulers = configuration
            if isinstance(optimizers, list) and isinstance(schedulers, list):
                return optimizers, [self._keep(s, None) for s in schedulers]
        return configuration

    def _keep(self, entry: Any, monitor: str | None) -> Any:
        given = entry if isinstance(entry, dict) else {"scheduler": entry}
        scheduler = given.get("scheduler")
        monitor = given.get("monitor", monitor) or getattr(scheduler, "monitor", None)
        if isinstance(scheduler, ReduceLROnPlateau) and monitor is None:
            raise MisconfigurationException(
                "ReduceLROnPlateau needs the name of a logged value to watch, got none. Give it as "
                "`lr_scheduler_config={'monitor': 'val/loss'}`, or as `monitor` in the dictionary "
                "that `configure_optimizers` returns."
            )
        self._watched[id(scheduler)] = _Watched(monitor, given.get("strict", True))
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
            if (
                isinstance(config.scheduler, ReduceLROnPlateau) is plateau
                and config.interval == interval
                and count % config.frequency == 0
            ):
                self._step_one(trainer, config.scheduler)

    def _step_one(self, trainer: Trainer, scheduler: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            trainer.lightning_module.lr_scheduler_step(scheduler, None)
            return
        watched = self._watched[id(scheduler)]
        assert watched.monitor is not None
        value = trainer.callback_metrics.get(watched.monitor)
        if value is not None:
            trainer.lightning_module.lr_scheduler_step(scheduler, value)
            return
        message = (
            f"ReduceLROnPlateau watches '{watched.monitor}', which is not logged; logged are "
            f"{sorted(trainer.callback_metrics)}."
        )
        if watched.strict:
            raise MisconfigurationException(f"{message} Correct `monitor`.")
        rank_zero_warn(f"{message} The learning rate stays.", category=RuntimeWarning)
