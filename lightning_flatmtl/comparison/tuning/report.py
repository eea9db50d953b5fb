"""TrialReport: what a trial tells Optuna after each validation, and its end if it is pruned."""

import math
from pathlib import Path
from typing import Any, final

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.comparison.tuning.named import build, make_storage, optuna

__all__ = ["PRUNED", "TrialReport"]

PRUNED = "pruned after epoch"
"""The attribute of a trial of Optuna that says when it was pruned."""


@final
class TrialReport(Callback):
    """Reports a figure of the validation data to a trial of Optuna; it ends the run that is pruned.

    ``flatmtl tune`` adds it to the first seed of every trial. It reports at the end of each epoch
    with a validation. A figure that is not finite ends the run with an error.

    Args:
        search: The ``search.yaml`` of the search, which says what the storage and the pruner are.
        study: The name of the study.
        trial: The number of the trial in it.
        metric: The logged name of the figure.
    """

    def __init__(self, search: str, study: str, trial: int, metric: str) -> None:
        self.search, self.study, self.trial, self.metric = search, study, trial, metric
        self._open: Any = None
        self._validated = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._open = self._opened()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated, self._validated = self._validated, False
        if not validated or self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        here = trainer.is_global_zero
        said = self._told(value, trainer.current_epoch) if here else (True, False)
        finite, pruned = trainer.strategy.broadcast(said)  # all processes end together
        if not finite:
            raise FloatingPointError(
                f"{self.metric} was not finite after epoch {trainer.current_epoch + 1}"
            )
        trainer.should_stop = trainer.should_stop or pruned

    def _told(self, value: float, epoch: int) -> tuple[bool, bool]:
        """Whether the figure is finite, and whether the trial is pruned."""
        if not math.isfinite(value):
            return False, False
        if PRUNED in self._open.user_attrs:
            return True, True
        if epoch not in self._reported():  # an epoch that a broken run begins anew
            self._open.report(value, epoch)
        pruned = bool(self._open.should_prune())
        if pruned:
            self._open.set_user_attr(PRUNED, epoch + 1)
        return True, pruned

    def _opened(self) -> Any:
        package, said = optuna(), yaml.safe_load(Path(self.search).read_text(encoding="utf-8"))
        study = package.load_study(
            study_name=self.study,
            storage=make_storage(said["storage"]),
            sampler=package.samplers.RandomSampler(),  # nothing is sampled here
            pruner=build("pruner", said["pruner"]),
        )
        return package.trial.Trial(study, self._frozen(study)._trial_id)

    def _reported(self) -> dict[int, float]:
        found: dict[int, float] = self._frozen(self._open.study).intermediate_values
        return found

    def _frozen(self, study: Any) -> Any:
        return study.get_trials(deepcopy=False)[self.trial]
