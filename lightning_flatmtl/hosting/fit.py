"""What one fit owns, whichever host runs its steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_flatmtl.engine import MultiTaskStep, Passes, Sharpness, StepResult
from lightning_flatmtl.engine.gradients.accumulation import ALONE, Place
from lightning_flatmtl.engine.gradients.nested import refuse_unfit_to_nest
from lightning_flatmtl.hosting.compiling import SeveralBackwards
from lightning_flatmtl.hosting.flatness_schedule import FlatnessSchedule, updates_of
from lightning_flatmtl.hosting.muting import metrics_unmoved
from lightning_flatmtl.hosting.random_streams import RandomStreams
from lightning_flatmtl.hosting.refusals import refuse_unfit_trainer, warn_of_lost_scale
from lightning_flatmtl.hosting.thawing import save_frozen, thaw_as_saved
from lightning_flatmtl.hosting.trainer import (
    aggregator_of,
    loss_scale,
    optimized,
    processes_of,
    schedule_of,
    sharpness_of,
)
from lightning_flatmtl.hosting.watch import TrainingWatch

__all__ = ["Fit"]

_PARTITION = "lightning_flatmtl.partition"
_BETWEEN = "lightning_flatmtl.between_steps"

AgainMaker = Callable[[], Passes]


class Fit:
    """The method of a fit, its engine and processes, and what has been found out.

    A host says how the losses of a batch are computed (its passes) and how the loss that
    :meth:`run` returns enters Lightning: by hand in a :class:`~lightning_flatmtl.MultiTaskModule`,
    automatically in a module that is taken over. All else is here.

    Args:
        trainer: The Trainer of the fit; ``None`` before there is one.
        tasks: The tasks that the module declares.
    """

    def __init__(self, trainer: Trainer | None = None, tasks: Sequence[str] = ()) -> None:
        # Kept, because a learning-rate finder trains with callbacks of its own.
        self.aggregator: Any = None if trainer is None else aggregator_of(trainer)
        self.sharpness: Sharpness | None = None if trainer is None else sharpness_of(trainer)
        self.schedule = FlatnessSchedule() if trainer is None else schedule_of(trainer)
        self._trainer = trainer
        self._updates: float | None = None
        self.engine = MultiTaskStep(
            processes=None if trainer is None else processes_of(trainer), tasks=tasks
        )
        self.watch = TrainingWatch(tasks)
        self.last_step: StepResult | None = None
        self.second_pass = False
        self.streams = RandomStreams()
        self._declares_tasks = bool(tasks)
        self._compiling: SeveralBackwards | None = None
        self._latest: list[AgainMaker] = []

    # The method.

    @property
    def has_method(self) -> bool:
        """Whether an aggregator or a TaskSAM decides the step, or it is the plain sum."""
        return self.aggregator is not None or self.sharpness is not None

    @property
    def present_sharpness(self) -> Sharpness | None:
        """The perturbations of the present update; ``None`` for the plain method."""
        trainer = self._trainer
        if self.sharpness is None or trainer is None:
            return self.sharpness
        if self.schedule.start and self._updates is None:
            self._updates = updates_of(trainer)
        return self.schedule.at(trainer.global_step, self._updates or 0.0, self.sharpness)

    @property
    def runs_again(self) -> bool:
        """Whether the present step has a second pass."""
        present = self.present_sharpness
        return present is not None and present.active

    @property
    def accumulates(self) -> bool:
        """Whether batches are accumulated task by task, or summed up as in plain training."""
        sums = self.aggregator is None or self.aggregator.is_plain_sum
        return self.runs_again or not sums

    @property
    def needs_losses_after_step(self) -> bool:
        """Whether the aggregator asks for the losses of an update's batches after it."""
        return self.aggregator is not None and self.aggregator.needs_losses_after_step

    # Its course.

    def begin(self, trainer: Trainer) -> None:
        """Refuse what the method cannot do with, and make ready; called before the first batch."""
        self.streams.begin()
        if self.has_method:
            refuse_unfit_trainer(trainer)
            refuse_unfit_to_nest(self.aggregator, self.sharpness)
            warn_of_lost_scale(self.aggregator, self.sharpness)
            self._compiling = SeveralBackwards()

    def run(
        self, module: LightningModule, passes: Passes, place: Place = ALONE
    ) -> StepResult | None:
        """One step of Algorithm 1.

        Args:
            module: The module in training.
            passes: Computes the losses of the batch.
            place: The place of the batch among those that make one update.

        Returns:
            What the engine found; ``None`` for a batch that has nothing to say.
        """
        trainer = module.trainer
        last = trainer.is_last_batch
        scale, trained = loss_scale(trainer, module), optimized(trainer)
        sharpness = self.present_sharpness
        result = self.engine(
            module, passes, self.aggregator, sharpness, scale, last, trained, place
        )
        self.last_step = None if result is None else result.detached()
        if result is None or result.skipped:
            self.watch.skip()
        if result is None:
            return None
        updates = result.loss is not None
        if updates and self.aggregator is not None and not self._declares_tasks:
            self.aggregator.note_tasks(result.update_losses, whole=last)
        self.watch.after_step(result, self.engine.partition, module, self.sharpness)
        return result

    def keep(self, again: AgainMaker, place: Place) -> None:
        """Keep what makes the passes of a batch anew, until its update has been looked at."""
        self._latest = [*(() if place.first else self._latest), again]

    def losses_again(
        self, module: LightningModule, otherwise: AgainMaker | None = None
    ) -> dict[str, torch.Tensor]:
        """The losses of the latest update's batches at the parameters as they are now.

        Without graphs, and without a trace in buffers, metrics, logs and random streams.

        Args:
            module: The module in training.
            otherwise: Makes the passes to run where no batch was kept.
        """
        precision = module.trainer.precision_plugin
        # With gradients: the losses of an energy or a PINN differentiate inside.
        with torch.enable_grad(), precision.forward_context():
            makers = self._latest or ([] if otherwise is None else [otherwise])
            return self.engine.means(make() for make in makers)

    @contextmanager
    def muted(self, module: LightningModule) -> Iterator[None]:
        """Around a second pass: it is known as one, and metrics afterwards are as before."""
        self.second_pass = True
        try:
            with metrics_unmoved(module):
                yield
        finally:
            self.second_pass = False

    def after_epoch(self, module: LightningModule, whole: bool = True) -> None:
        """Speak up about what an epoch has shown."""
        self.watch.after_epoch(self.engine.partition, module, whole)
        for name, count in self.watch.epoch_counts().items():
            module.log(name, count)

    def exchange_streams(self, module: LightningModule) -> None:
        """Let all processes know the random streams of all; to be called in all of them."""
        self.streams.exchange(module.trainer, module, self.engine.processes)

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what is shared, and the random streams."""
        named = dict(module.named_parameters())
        checkpoint[_PARTITION] = self.engine.partition.state_dict(named)
        if self.sharpness is not None:
            names: dict[torch.Tensor, str] = {p: name for name, p in named.items()}
            checkpoint[_BETWEEN] = self.engine.between.state_dict(names)
        self.streams.save(module.trainer, module, checkpoint)
        save_frozen(module.trainer, module, checkpoint)

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue from :meth:`save`."""
        self.streams.load(module.trainer, module, checkpoint)
        thaw_as_saved(module.trainer, module, checkpoint)
        if _PARTITION in checkpoint:
            named = dict(module.named_parameters())
            self.engine.partition.load_state_dict(checkpoint[_PARTITION], named)
        if _BETWEEN in checkpoint and self.sharpness is not None:
            names: dict[torch.Tensor, str] = {p: name for name, p in named.items()}
            self.engine.between.load_state_dict(checkpoint[_BETWEEN], names)

    def close(self) -> None:
        """Give memory and processes back; what was found out stays."""
        if self._compiling is not None:
            self._compiling.release()
            self._compiling = None
        self.engine.processes.close()
        self.engine = MultiTaskStep(self.engine.partition)
        self.aggregator = self.sharpness = self._trainer = None
        self._latest = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module is in no fit.
        return {**vars(self), "_compiling": None, "_trainer": None, "_latest": []}
