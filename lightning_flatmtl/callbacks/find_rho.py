"""find_rho: a short fit that looks for the radius of TaskSAM, and leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import (
    _LoggerConnector,
)
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_flatmtl.callbacks._batches import unmoved
from lightning_flatmtl.callbacks._radius_results import RhoResults
from lightning_flatmtl.callbacks.rho_finder import RhoFinder
from lightning_flatmtl.hosting.trainer import aggregator_of

__all__ = ["find_rho"]


def find_rho(
    trainer: Trainer,
    module: LightningModule,
    data: Any = None,
    val_dataloaders: Any = None,
    **settings: Any,
) -> RhoResults:
    """Look for the radius of :class:`~lightning_flatmtl.TaskSAM` before a fit begins.

    What Lightning's ``Tuner.lr_find`` does for the learning rate: a short fit, with a
    :class:`~lightning_flatmtl.callbacks.RhoFinder`. A copy of the module is trained for the steps
    of the warm-up, by a copy of the Trainer's aggregator if it has one, and without its TaskSAM,
    its other callbacks and its loggers. Module, Trainer and random streams are afterwards as
    before.

    Args:
        trainer: The Trainer of the fit to come.
        module: The module.
        data: A data module, or loaders of training data; by default the module's own.
        val_dataloaders: Loaders of validation data, beside loaders of training data.
        **settings: Those of :class:`~lightning_flatmtl.callbacks.RhoFinder`, for example
            ``warmup_steps``.

    Returns:
        What was found.

    Raises:
        ValueError: If a setting is out of its bounds.
        MisconfigurationException: If the fit ends before the warm-up, or if the module or the
            strategy is one that cannot be looked at.

    Example:
        >>> results = find_rho(trainer, module, datamodule, warmup_steps=200)  # doctest: +SKIP
        >>> sam = TaskSAM(rho=results.suggestion())  # doctest: +SKIP
    """
    if settings.get("update_attr", False) is not False:
        raise ValueError(
            f"`update_attr` of find_rho must be False, got {settings['update_attr']!r}. Make a "
            "TaskSAM of what it suggests, or give the Trainer a `RhoFinder(update_attr=True)`."
        )
    finder = RhoFinder(**settings)
    aggregator = aggregator_of(trainer)
    callbacks = [finder, _Leaving(finder), *([] if aggregator is None else [deepcopy(aggregator)])]
    whole = isinstance(data, LightningDataModule)
    given = (None, val_dataloaders, data) if whole else (data, val_dataloaders, None)
    with isolate_rng(), unmoved(pytree.tree_leaves(given)), _put_aside(trainer, callbacks):
        trainer.fit(deepcopy(module), *given)
    if finder.results is None:
        raise MisconfigurationException(
            "find_rho expects a fit that is longer than the warm-up, got one that ended before. "
            "Use a smaller `warmup_steps`, or more epochs."
        )
    return finder.results


class _Leaving(Callback):
    """Ends the fit when the radius is found.

    Args:
        finder: What looks for it.
    """

    def __init__(self, finder: RhoFinder) -> None:
        self._finder = finder

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._finder.results is not None:
            raise _TunerExitException  # which the Trainer takes for the end of a tuning


@contextmanager
def _put_aside(trainer: Trainer, callbacks: list[Callback]) -> Iterator[None]:
    """Run a block in which the Trainer fits from step 0 with other callbacks, and forget it."""
    strategy, precision, loop = trainer.strategy, trainer.precision_plugin, trainer.fit_loop
    before, scaling = dict(vars(trainer)), deepcopy(precision.state_dict())
    of_strategy = {name: value for name, value in vars(strategy).items() if name in _OF_STRATEGY}
    try:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        trainer.loggers = [DummyLogger() for _ in trainer.loggers[:1]]
        trainer.num_sanity_val_steps = 0
        trainer.state = copy(trainer.state)
        trainer._logger_connector = _LoggerConnector(trainer)
        trainer.fit_loop = _FitLoop(trainer, loop.min_epochs, loop.max_epochs)
        trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer, loop.min_steps, loop.max_steps)
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        vars(strategy).update(of_strategy)
        precision.load_state_dict(scaling)


_OF_STRATEGY = (
    "_lightning_module",
    "_model",
    "_optimizers",
    "_lightning_optimizers",
    "lr_scheduler_configs",
)
