"""MultiTaskModule: the Lightning side of a step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_flatmtl._batches import batch_size, is_pair, per_task
from lightning_flatmtl._manual import ManualOptimization
from lightning_flatmtl._muting import metrics_unmoved
from lightning_flatmtl._reports import EpochReports
from lightning_flatmtl._watch import TrainingWatch
from lightning_flatmtl.aggregators import Aggregator
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    Passes,
    Sharpness,
    StepResult,
    WholePasses,
)
from lightning_flatmtl.functional.delta_m import check_delta_m, delta_m
from lightning_flatmtl.metrics import load_baselines
from lightning_flatmtl.sharpness import TaskSAM
from lightning_flatmtl.task import Task

__all__ = ["MultiTaskModule"]

_STAGES = ("train", "val", "test")


class MultiTaskModule(LightningModule):
    r"""A network with several tasks; the callbacks of the Trainer say how it is trained.

    Without a callback it is trained on the plain sum of the losses. An
    :class:`~lightning_flatmtl.aggregators.Aggregator` combines the task gradients, a
    :class:`~lightning_flatmtl.TaskSAM` makes the minima flat for every task.

    Three ways to say what the model is:

    1. compose it of ``encoder`` and ``tasks``, each with a head and a loss;
    2. override :meth:`encode` and :meth:`task_loss`, for other batches and features;
    3. override :meth:`losses`, for models that do not split into encoder and heads.

    A batch is ``(inputs, {task: target})``, or ``{task: (inputs, target)}`` with a data set per
    task. A task that is missing from a batch is left out of that step.

    Which parameters are shared is found from the graph: those that two or more losses reach. A
    parameter that a single loss reaches belongs to that task's head. :meth:`shared_parameters` and
    :meth:`task_parameters` override the finding.

    Logged: ``train/loss``, ``{stage}/{task}/loss``, ``{stage}/{task}/{metric}``, and
    ``{stage}/delta_m`` when baselines are given.

    Args:
        encoder: Maps inputs to features. A mapping with the names of tasks gives every task its
            own features.
        tasks: The tasks.
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps the optimizer to a learning-rate scheduler.
        lr_scheduler_config: ``interval`` (``"epoch"`` or ``"step"``), ``frequency``, ``monitor``,
            ``strict``, ``name`` of the scheduler, as in ``configure_optimizers``.
        gradient_clip_val: Bound of the gradient; here, since the Trainer refuses it in manual
            optimization.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: Batches per optimizer step; here for the same reason. Each batch's
            task gradients are aggregated by themselves, and the directions averaged.
        baselines: Single-task values by ``"task/metric"``, or the path of a YAML or JSON file with
            them; with them ``{stage}/delta_m`` is logged, the mean relative improvement in percent.

    Raises:
        ValueError: If tasks are missing or named twice, or the baselines do not fit the metrics.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatmtl import MultiTaskModule, Task
        >>> module = MultiTaskModule(
        ...     encoder=nn.Linear(8, 4),
        ...     tasks=[
        ...         Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss()),
        ...         Task("b", head=nn.Linear(4, 3), loss=nn.CrossEntropyLoss()),
        ...     ],
        ... )
        >>> {name: tuple(y.shape) for name, y in module(torch.zeros(2, 8)).items()}
        {'a': (2, 1), 'b': (2, 3)}
    """

    second_pass: bool
    """Whether the model is being run at perturbed parameters; what must happen once a batch, such
    as writing to ``self.logger.experiment``, asks this first. ``self.log`` and metrics do."""

    last_step: StepResult | None
    """What the latest training step found out: losses, Gram matrices."""

    engine: MultiTaskStep
    """The engine of the present fit; ``engine.partition`` knows what is shared."""

    watch: TrainingWatch
    """Speaks up about absent tasks, dead gradients and parameters that nothing reaches."""

    def __init__(
        self,
        encoder: nn.Module | None = None,
        tasks: list[Task] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_config: dict[str, Any] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        accumulate_grad_batches: int = 1,
        baselines: dict[str, float] | str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = encoder
        self.tasks = list(tasks or ())
        self._check_tasks()
        self.heads = nn.ModuleDict({t.name: t.head for t in self.tasks if t.head is not None})
        self.loss_modules = nn.ModuleDict(
            {t.name: t.loss for t in self.tasks if isinstance(t.loss, nn.Module)}
        )
        for stage in _STAGES:
            self.add_module(f"{stage}_metrics", nn.ModuleDict(self._metrics_of(stage)))
        self.baselines = None if baselines is None else load_baselines(baselines)
        self._directions = self._metric_directions()
        if self.baselines is not None:  # refuses baselines that do not fit the metrics
            check_delta_m(self._directions, self.baselines, self._directions)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._lr_scheduler_config = lr_scheduler_config or {}
        self._manual = ManualOptimization(
            gradient_clip_val, gradient_clip_algorithm, accumulate_grad_batches
        )
        self._stage = "val"
        self.second_pass = False
        self.last_step = None
        self.start_fit()

    # What the model is: override these to change less than everything.

    def encode(self, batch: Any) -> Any:
        """Features of a batch ``(inputs, targets)``; by default ``encoder(inputs)``."""
        assert self.encoder is not None
        return self.encoder(batch[0])

    def task_output(self, task: Task, features: Any) -> Any:
        """Predictions of one task; by default its head on the features (or on its own features)."""
        if isinstance(features, Mapping) and task.name in features:
            features = features[task.name]
        return self.heads[task.name](features)

    def task_loss(self, task: Task, features: Any, batch: Any) -> Tensor | None:
        """Loss of one task, a scalar; ``None`` when the batch has nothing for the task.

        By default the task's loss on its head's predictions and ``targets[task]``, which also
        updates the task's metrics. An override that wants them calls :meth:`update_metrics`.

        Args:
            task: The task; it equals its name, so ``targets[task]`` works.
            features: What :meth:`encode` returned.
            batch: ``(inputs, targets)``.
        """
        predictions = self.task_output(task, features)
        target = batch[1][task.name]
        self.update_metrics(task, predictions, target)
        assert task.loss is not None
        return task.loss(predictions, target)

    def losses(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """The losses by task name; override it for models that do not split."""
        return self._composed(batch).clean()

    def shared_parameters(self) -> Iterable[nn.Parameter] | None:
        """The shared parameters; ``None`` to find them from the graph."""
        return None

    def task_parameters(self, task: Task) -> Iterable[nn.Parameter] | None:
        """The parameters of one task's head; ``None`` to find them from the graph."""
        return None

    @override
    def forward(self, inputs: Any) -> dict[str, Any]:
        """Predictions of every task by name."""
        features = self.encode((inputs, {}))
        return {task.name: self.task_output(task, features) for task in self.tasks}

    def update_metrics(self, task: Task | str, predictions: Any, target: Any) -> None:
        """Feed one task's metrics; nothing happens in the second pass."""
        collections = self._collections(self._stage)
        name = task if isinstance(task, str) else task.name
        if self.second_pass or name not in collections:
            return
        collection = collections[name]
        if isinstance(predictions, Tensor):
            predictions = predictions.detach()
        collection.update(predictions, target)
        if self._trainer is not None:
            self.log_dict(collection, on_step=False, on_epoch=True)

    # How Lightning runs it.

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """One step of Algorithm 1 with the Trainer's aggregator and TaskSAM."""
        self._stage = "train"
        self.watch.before_step(batch)
        sharpness = self._sharpness()
        result = self.engine(self, self._passes(batch, batch_idx), self._aggregator(), sharpness)
        self._manual.optimize(self, None if result is None else result.loss, batch_idx)
        self.last_step = None if result is None else result.detached()
        if result is None:
            return None
        self.watch.after_step(result, self.engine.partition, self, sharpness)
        self._log_losses("train", result.losses, batch)
        return {"loss": result.total, "losses": result.losses}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses and metrics under ``val/``."""
        self._evaluate("val", batch, batch_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Losses and metrics under ``test/``."""
        self._evaluate("test", batch, batch_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Predictions of every task by name, for inputs or for ``(inputs, targets)``."""
        outputs: dict[str, Any] = self(batch[0] if is_pair(batch) else batch)
        return outputs

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and the scheduler if there is one."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, **self._lr_scheduler_config},
        }

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        """What manual optimization leaves out; an override adds to the list of ``super()``."""
        return [self._manual, EpochReports()]

    @override
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Log a value, once a batch: nothing happens in the second pass."""
        if not self.second_pass:
            super().log(name, *args, **kwargs)

    @property
    def has_method(self) -> bool:
        """Whether an aggregator or a TaskSAM decides the step, or it is the plain sum."""
        return self._aggregator() is not None or self._sharpness() is not None

    # Inside.

    def start_fit(self) -> None:
        """Forget what an earlier fit found out; called before the first batch of every fit."""
        self.engine = MultiTaskStep()
        self.watch = TrainingWatch([task.name for task in self.tasks])

    def declare_partition(self) -> None:
        """Begin with the parameters that the module declares; called once they all exist."""
        heads = {task.name: self.task_parameters(task) for task in self.tasks}
        self.engine.partition.declare(
            self.shared_parameters(),
            {t: params for t, params in heads.items() if params is not None},
        )

    def relative_improvement(self, stage: str) -> float | None:
        """Delta_m of the epoch, ``None`` without baselines or while a metric has no value."""
        if self.baselines is None:
            return None
        collections = self._collections(stage)
        if not all(m.update_called for c in collections.values() for m in c.values()):
            return None
        values = {
            name.removeprefix(f"{stage}/"): value
            for collection in collections.values()
            for name, value in collection.compute().items()
        }
        return delta_m(values, self.baselines, self._directions)

    def _passes(self, batch: Any, batch_idx: int) -> Passes:
        if self._overrides("losses"):
            return WholePasses(lambda: self.losses(batch, batch_idx), self, self._muted)
        return self._composed(batch)

    def _composed(self, batch: Any) -> ComposedPasses:
        own_form = self._overrides("encode") and self._overrides("task_loss")
        batches = per_task(batch, self.tasks, own_form)
        by_name = {task.name: task for task in batches}

        def task_loss(name: str, features: Any, batch: Any) -> Tensor | None:
            return self.task_loss(by_name[name], features, batch)

        named = {task.name: part for task, part in batches.items()}
        return ComposedPasses(self.encode, task_loss, named, self, self._muted)

    @contextmanager
    def _muted(self) -> Iterator[None]:
        self.second_pass = True
        try:
            with metrics_unmoved(self):
                yield
        finally:
            self.second_pass = False

    def _aggregator(self) -> Aggregator | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, Aggregator)), None)

    def _sharpness(self) -> Sharpness | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c.sharpness for c in callbacks if isinstance(c, TaskSAM)), None)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> None:
        self._stage = stage
        losses = {t: loss.detach() for t, loss in self.losses(batch, batch_idx).items()}
        if losses:
            self._log_losses(stage, losses, batch)

    def _log_losses(self, stage: str, losses: Mapping[str, Tensor], batch: Any) -> None:
        size = batch_size(batch)
        total = torch.stack([loss.to(torch.float64) for loss in losses.values()]).sum()
        self.log(log_name(stage, "loss"), total.float(), prog_bar=True, batch_size=size)
        for task, loss in losses.items():
            self.log(log_name(stage, task, "loss"), loss, batch_size=size)

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(MultiTaskModule, name)

    def _check_tasks(self) -> None:
        for task in self.tasks:
            if not isinstance(task, Task):
                raise TypeError(f"`tasks` must be Task objects, got {type(task).__name__}.")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`tasks` must have different names, got {twice} more than once.")
        if self._overrides("losses"):
            return
        if not names:
            raise ValueError(
                "`tasks` must hold at least one Task, got none. Pass `tasks=[Task(...), ...]`, or "
                "override `losses`."
            )
        if self.encoder is None and not self._overrides("encode"):
            raise ValueError("`encoder` must be a module, got None. Pass one or override `encode`.")
        if self._overrides("task_loss"):
            return
        for task in self.tasks:
            if task.head is None and not self._overrides("task_output"):
                raise ValueError(f"Task '{task.name}' must have a head, got None.")
            if task.loss is None:
                raise ValueError(f"Task '{task.name}' must have a loss, got None.")

    def _metrics_of(self, stage: str) -> dict[str, nn.Module]:
        return {
            task.name: MetricCollection(
                {name: metric.clone() for name, metric in task.metrics.items()},
                prefix=log_name(stage, task.name, ""),
            )
            for task in self.tasks
            if task.metrics
        }

    def _collections(self, stage: str) -> dict[str, MetricCollection]:
        return dict(getattr(self, f"{stage}_metrics").items())

    def _metric_directions(self) -> dict[str, bool]:
        return {
            f"{task.name}/{name}": metric.higher_is_better  # type: ignore[misc]
            for task in self.tasks
            for name, metric in task.metrics.items()
        }


def log_name(stage: str, *parts: str) -> str:
    """``{stage}/{task}/{name}``, the one form of all logged names."""
    return "/".join((stage, *parts))
