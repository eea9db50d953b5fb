"""A module evaluated at other parameters than its own, without a trace in it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_flatmtl.callbacks._directions import Displacement
from lightning_flatmtl.callbacks._values import LogRecorder, Means, MetricCopies, evaluation_step
from lightning_flatmtl.engine.passes.inputs import Inputs, own_copy
from lightning_flatmtl.engine.passes.rng_replay import RNGReplay
from lightning_flatmtl.engine.passes.state_guards import frozen_module
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.hosting.batches import batch_size
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.muting import log_replaced
from lightning_flatmtl.hosting.untraced import looking_at

__all__ = ["Evaluation", "Explorer", "Stage", "working_on"]

Stage = Literal["train", "val", "test"]
Point = TypeVar("Point")


class Found:
    """What has been found at one point, in this process."""

    def __init__(self) -> None:
        self.losses, self.logged = Means(), LogRecorder()


class Evaluation:
    """Evaluates a module on the same batches at several points.

    In evaluation mode, with the same random numbers at each point. Parameters apart, which the
    caller moves and puts back, everything is afterwards as before: modes, buffers and plain
    attributes of the module, its metrics and logs, the global random streams.

    Args:
        trainer: A Trainer that is running.
        module: Its module.
        stage: Whose evaluation step is asked, and what the Trainer says that it is doing meanwhile.
        logged: Whether to take all that the evaluation step logs, or only the losses of tasks.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, stage: Stage, logged: bool
    ) -> None:
        self._trainer, self._module, self._stage = trainer, module, stage
        own_step = "test_step" if stage == "test" else "validation_step"
        self._asks_step = logged and is_overridden(own_step, module)
        # A MultiTaskModule logs its losses.
        self._asks_losses = not (self._asks_step and isinstance(module, Host))
        self._tape = RNGReplay(module.device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around everything that is evaluated, drawing the batches included."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self._tape.replaying(),
            working_on(self._trainer, self._stage),
            _in_evaluation_mode(self._module),
        ):
            self._tape.mark("start")
            yield

    def at(
        self,
        points: Sequence[Point],
        go: Callable[[Point], None],
        batches: Iterable[tuple[Any, int]],
    ) -> list[Found]:
        """What is found at every point; to be called in the block of :meth:`ready`.

        Args:
            points: The points.
            go: Moves the parameters to one.
            batches: The batches and their numbers; drawn with the same random numbers every time.
        """
        self._tape.rewind("start")
        metrics = MetricCopies(self._module, len(points) if self._asks_step else 0)
        found = [Found() for _ in points]
        for batch, batch_idx in batches:
            if self._asks_losses:
                for i, values in enumerate(self._losses(points, go, batch, batch_idx)):
                    for task, loss, n in values:
                        found[i].losses.add(f"{task}/loss", loss, n)
            if self._asks_step:
                self._log(points, go, batch, batch_idx, found, metrics)
        return found

    def _losses(
        self, points: Sequence[Point], go: Callable[[Point], None], batch: Any, batch_idx: int
    ) -> Iterator[list[tuple[str, Tensor, float]]]:
        """At every point the task losses of a batch, and the samples that each is the mean of."""
        size = float(batch_size(batch))
        with looking_at(self._module, batch, batch_idx, evaluate=True, size=size) as look:
            for point in points:
                go(point)
                losses = {task: loss.detach() for task, loss in look.losses().items()}
                yield [(task, loss, look.counts[task]) for task, loss in losses.items()]

    def _log(
        self,
        points: Sequence[Point],
        go: Callable[[Point], None],
        batch: Any,
        batch_idx: int,
        found: Sequence[Found],
        metrics: MetricCopies,
    ) -> None:
        """Run the evaluation step of a batch at every point and take what it logs."""
        module, inputs = self._module, Inputs(own_copy(batch), batch_idx)
        step = evaluation_step(module, self._stage)
        self._tape.mark("batch")
        with frozen_module(module) as put_back:
            for i, point in enumerate(points):
                go(point)
                put_back()
                self._tape.rewind("batch")
                found[i].logged.of_batch(batch)
                with (
                    metrics.lent(i),
                    log_replaced(module, found[i].logged),
                    self._trainer.precision_plugin.val_step_context(),
                ):
                    step(*inputs.take()[0])


class Explorer:
    """Evaluates a module beside its parameters, over the samples of all processes.

    Args:
        evaluation: The evaluation.
        displacement: Moves the parameters.
        batches: Draws the batches.
        processes: The processes of the Trainer.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        displacement: Displacement,
        batches: Callable[[], Iterable[tuple[Any, int]]],
        processes: Processes,
    ) -> None:
        self._evaluation, self._displacement = evaluation, displacement
        self._batches, self._processes = batches, processes

    @property
    def origin(self) -> list[Tensor]:
        """The parameters as they were."""
        return self._displacement.origin

    def values(
        self, directions: Sequence[Sequence[Tensor]], points: Sequence[Sequence[float]]
    ) -> list[dict[str, float]]:
        """All values at the points whose coefficients along the directions are given."""
        error, found = None, []
        try:
            found = self._evaluation.at(
                points, lambda point: self._displacement.to(directions, point), self._batches()
            )
        except Exception as raised:
            error = raised  # the other processes are told before it goes on
        self._processes.end(error)
        return _over_processes(found, self._processes)


def _over_processes(found: Sequence[Found], processes: Processes) -> list[dict[str, float]]:
    """The values at every point, over the samples of all processes.

    Values that have no sample are left out.
    """
    values = [_metrics_of(of_point, processes) for of_point in found]
    for means in ([f.logged.means for f in found], [f.losses for f in found]):
        everyones = processes.everyones([of_point.numbers() for of_point in means])
        for of_point, *numbers in zip(values, *everyones, strict=True):
            of_point.update(_added_up(numbers))
    return values


def _metrics_of(found: Found, processes: Processes) -> dict[str, float]:
    """The values of the metrics; each is computed where all processes have it."""
    metrics = found.logged.metrics
    everyones = processes.everyones({name: m.update_called for name, m in metrics.items()})
    values: dict[str, float] = {}
    for name in everyones[0]:
        if all(name in fed for fed in everyones) and any(fed[name] for fed in everyones):
            with warnings.catch_warnings():  # of a metric that only other processes have fed
                warnings.simplefilter("ignore", UserWarning)
                computed = metrics[name].compute()
            if isinstance(computed, Tensor) and computed.numel() == 1:
                values[name] = float(computed)
    return values


def _added_up(of_processes: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means from the sums and the samples of every process."""
    sums: dict[str, float] = {}
    samples: dict[str, float] = {}
    for numbers in of_processes:
        for name, (summed, n) in numbers.items():
            sums[name] = sums.get(name, 0.0) + summed
            samples[name] = samples.get(name, 0.0) + n
    return {name: summed / samples[name] for name, summed in sums.items() if samples[name]}


@contextmanager
def working_on(trainer: Trainer, stage: Stage) -> Iterator[None]:
    """Run the block with the Trainer saying that it is at ``stage``."""
    before = trainer.state.stage
    trainer.state.stage = _STAGES[stage]
    try:
        yield
    finally:
        trainer.state.stage = before


_STAGES = {
    "train": RunningStage.TRAINING,
    "val": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
}


@contextmanager
def _in_evaluation_mode(module: LightningModule) -> Iterator[None]:
    """Run the block in evaluation mode, then give every layer its own mode back."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for layer, training in modes:
            layer.training = training
