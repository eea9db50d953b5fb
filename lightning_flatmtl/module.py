"""MultiTaskModule: the Lightning side of a step."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_flatmtl.aggregators import Aggregator
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    Passes,
    Sharpness,
    StepResult,
    WholePasses,
)
from lightning_flatmtl.engine.checks import check_scalars
from lightning_flatmtl.engine.gradients.accumulation import ALONE
from lightning_flatmtl.engine.passes.base import plain
from lightning_flatmtl.engine.passes.failed import FailedPasses
from lightning_flatmtl.engine.passes.inputs import Inputs
from lightning_flatmtl.functional.delta_m import check_delta_m, delta_m
from lightning_flatmtl.hosting.batches import batch_size, is_pair, per_task, target_names
from lightning_flatmtl.hosting.fit import Fit
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.labels import noted_labels, noted_nan
from lightning_flatmtl.hosting.manual import ManualOptimization
from lightning_flatmtl.hosting.names import nearest
from lightning_flatmtl.hosting.refusals import refuse_unfit_for_gram, refuse_unfit_gradients
from lightning_flatmtl.hosting.reports import FitReports
from lightning_flatmtl.hosting.schedulers import SchedulerCallable
from lightning_flatmtl.hosting.task_metrics import TaskMetrics, log_name
from lightning_flatmtl.metrics import load_baselines
from lightning_flatmtl.task import Task

__all__ = ["MultiTaskModule"]

_SCHEDULER_KEYS = ("interval", "frequency", "monitor", "strict", "name")


class MultiTaskModule(LightningModule, Host):
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

    Logged, ``stage`` being ``train``, ``val`` or ``test``: ``{stage}/loss``, the sum of the losses;
    ``{stage}/{task}/loss``; ``{stage}/{task}/{metric}``, of the epoch; and ``{stage}/delta_m`` when
    baselines are given. Several validation or test data loaders are measured one by one, their
    names end in ``/dataloader_idx_0`` and so on, as always in Lightning.

    It trains in manual optimization and does there what automatic optimization does, with three
    differences. ``gradient_clip_val`` and ``accumulate_grad_batches`` are arguments of the module,
    since the Trainer refuses its own. The module's ``on_before_optimizer_step`` sees the gradients
    after clipping. With accumulation, loggers get a row for every batch, under the number of the
    update that it belongs to. ``StochasticWeightAveraging``, ``GradientAccumulationScheduler`` and
    ``ModelCheckpoint(train_time_interval=...)`` are not supported.

    Args:
        encoder: Maps inputs to features. A mapping with the names of tasks gives every task its
            own features.
        tasks: The tasks.
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps the optimizer to a learning-rate scheduler.
        lr_scheduler_config: ``interval`` (``"epoch"`` or ``"step"``), ``frequency``, ``monitor``,
            ``strict``, ``name`` of the scheduler, as in ``configure_optimizers``.
        gradient_clip_val: Bound of the gradient, in ``[0, inf)``; ``None`` for no clipping.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: Batches per optimizer step, at least 1. With an aggregator or a
            TaskSAM they train as one batch that holds all their samples: the task gradients are
            accumulated, each task's as the mean over its samples, and aggregated once.
        baselines: Single-task values by ``"task/metric"``, or the path of a YAML or JSON file with
            them; with them ``{stage}/delta_m`` is logged, the mean relative improvement in percent.

        gradients: Where the task Jacobian is taken: at the shared ``"parameters"``, or at the
            encoder's ``"features"``, with one backward pass of the trunk for all tasks (MGDA-UB,
            LibMTL's ``rep_grad``): an approximation for non-linear aggregators, cheap for many
            tasks, and not with TaskSAM. ``"gram"`` is at the parameters, exactly, in less memory:
            the inner products of the task gradients are found layer by layer, and one more backward
            pass gives the direction. For aggregators that look at inner products only, on one
            device, not with TaskSAM.

    Raises:
        ValueError: If tasks are missing or named twice, the baselines do not fit the metrics, or a
            setting is out of its bounds.

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

    def __init__(
        self,
        encoder: nn.Module | None = None,
        tasks: list[Task] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: SchedulerCallable | None = None,
        lr_scheduler_config: dict[str, Any] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        accumulate_grad_batches: int = 1,
        baselines: dict[str, float] | str | None = None,
        gradients: Literal["parameters", "features", "gram"] = "parameters",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = encoder
        if tasks is not None and not isinstance(tasks, list | tuple):
            raise TypeError(f"`tasks` must be a list of Task objects, got {type(tasks).__name__}.")
        self.tasks = list(tasks or ())
        self._check_tasks()
        self.heads = nn.ModuleDict({t.name: t.head for t in self.tasks if t.head is not None})
        self.loss_modules = nn.ModuleDict(
            {t.name: t.loss for t in self.tasks if isinstance(t.loss, nn.Module)}
        )
        self.task_metrics = TaskMetrics(self.tasks)
        self.baselines = None if baselines is None else load_baselines(baselines)
        if self.baselines is not None:  # refuses baselines that do not fit the metrics
            directions = self.task_metrics.directions
            check_delta_m(directions, self.baselines, directions)
        for name, given in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if given is not None and not callable(given):
                raise TypeError(
                    f"`{name}` must be a function that makes one, such as `lambda params: "
                    f"torch.optim.Adam(params, lr=1e-3)` for an optimizer, got "
                    f"{type(given).__name__}."
                )
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(f"`encoder` must be an nn.Module, got {encoder!r}.")
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._lr_scheduler_config = _checked(lr_scheduler_config or {})
        if lr_scheduler_config and lr_scheduler is None:
            raise ValueError(
                f"`lr_scheduler_config` needs a `lr_scheduler`, got {lr_scheduler_config} and "
                "`lr_scheduler=None`. Pass the scheduler, such as `lr_scheduler=lambda o: "
                "torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=100)`."
            )
        self._manual = ManualOptimization(
            gradient_clip_val, gradient_clip_algorithm, accumulate_grad_batches
        )
        if gradients not in {"parameters", "features", "gram"}:
            raise ValueError(
                f"`gradients` must be 'parameters', 'features' or 'gram', got {gradients!r}."
            )
        if gradients == "features" and self._overrides("losses"):
            raise ValueError(
                "`gradients='features'` needs a model of encoder and heads, got one that overrides "
                "`losses`. Override `encode` and `task_loss` instead, or use 'parameters'."
            )
        self.gradients = gradients
        self.listeners = []
        self._loader = 0
        self._labels: dict[str, int] = {}  # how many samples of the batch have one, by task
        self._fit = Fit(tasks=[task.name for task in self.tasks])

    # What the model is: override these to change less than everything.

    def encode(self, batch: Any) -> Any:
        """Features of a batch ``(inputs, targets)``; by default ``encoder(inputs)``."""
        if self.encoder is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no encoder, and `losses` alone makes no predictions. "
                "Override `forward` (or `predict_step`) to predict."
            )
        return self.encoder(batch[0])

    def task_output(self, task: Task, features: Any) -> Any:
        """Predictions of one task; by default its head on the features (or on its own features)."""
        by_task = isinstance(features, Mapping)
        if by_task and (task.name in features or getattr(features, "complete", False)):
            features = features[task.name]
        return self.heads[task.name](features)

    def task_loss(self, task: Task, features: Any, batch: Any) -> Tensor | None:
        """Loss of one task, a scalar; ``None`` when the batch has nothing for the task.

        By default the task's loss on its head's predictions and ``targets[task]``, both without the
        samples that have no label, which also updates the task's metrics. An override that wants
        them calls :meth:`update_metrics`.

        Args:
            task: The task; it equals its name, so ``targets[task]`` works.
            features: What :meth:`encode` returned.
            batch: ``(inputs, targets)``.
        """
        labelled = task.labelled(self.task_output(task, features), batch[1][task.name])
        if labelled is None:
            return None
        predictions, target = labelled
        self._labels[task.name] = batch_size(target)
        assert task.loss is not None
        with noted_labels(task, target):
            self.update_metrics(task, predictions, target)
            return task.loss(predictions, target)

    def losses(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """The losses by task name; override it for models that do not split."""
        return self._composed(batch).clean()

    def penalty(self, batch: Any, batch_idx: int) -> Tensor | None:
        """A term that belongs to no task, such as a penalty on weights; ``None`` for none.

        Its gradient is added to the step as it is: not aggregated, not perturbed, for all
        parameters that it reaches, and it makes none of them shared. Asked once for every training
        batch that has a task, after the losses; logged as ``train/penalty``, apart from
        ``train/loss``. By default what ``encoder.penalty()`` returns if the encoder has such a
        method, as :class:`~lightning_flatmtl.models.SoftSharing` has.
        """
        own = getattr(self.encoder, "penalty", None)
        penalty: Tensor | None = own() if callable(own) else None
        return penalty

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
        """Feed one task's metrics of the running stage; nothing happens in the second pass.

        Callbacks that look at predictions see what comes here.
        """
        stage = self._stage
        if stage is None or self.second_pass:
            return
        name = task if isinstance(task, str) else task.name
        for listener in self.listeners:
            listener(name, predictions, target)
        metrics = self.task_metrics.of_task(stage, self._loader, name)
        if metrics is None:
            return
        if isinstance(predictions, Tensor):
            predictions = predictions.detach()
        metrics.update(predictions, target)
        self._log_metrics(metrics)

    # How Lightning runs it.

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """One step of Algorithm 1 with the Trainer's aggregator and TaskSAM."""
        self._loader = 0
        self._labels = {}
        if self.engine.processes.size > 1:
            self._log_in_step("train")
        passes = self._read(batch, batch_idx)
        accumulates = self._fit.accumulates
        place = self._manual.place(self.trainer, batch_idx) if accumulates else ALONE
        if self._fit.needs_losses_after_step:
            inputs = Inputs(batch, batch_idx)
            inputs.take()  # the step gets the batch itself
            self._fit.keep(partial(self._passes_again, inputs, self._labels), place)
        if self._overrides("penalty") or hasattr(self.encoder, "penalty"):
            passes.penalty = lambda: self.penalty(batch, batch_idx)
        with noted_nan(batch, self.tasks):
            result = self._fit.run(self, passes, place)
        self._manual.optimize(self, result, batch_idx, accumulates)
        if result is None or result.skipped:
            return None
        if result.losses:
            self._log_losses("train", result.losses, batch)
        if result.penalty is not None:
            self.log(log_name("train", "penalty"), result.penalty, batch_size=batch_size(batch))
        return {"loss": result.total, "losses": result.losses}

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics under ``val/``."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics under ``test/``."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

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
        config = {"scheduler": scheduler, **self._lr_scheduler_config}
        if hasattr(scheduler, "monitor"):  # LightningCLI's ReduceLROnPlateau brings its own
            config.setdefault("monitor", scheduler.monitor)
        return {"optimizer": optimizer, "lr_scheduler": config}

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        """What manual optimization leaves out; an override adds to the list of ``super()``."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._manual.refuse_trainer_settings(self._trainer, type(self).__name__)
        if self._trainer is not None:  # else Lightning says in each further run what they replace
            given = self._trainer.callbacks  # type: ignore[attr-defined]
            ours = (FitReports, ManualOptimization)
            self._trainer.callbacks = [  # type: ignore[attr-defined]
                callback for callback in given if type(callback) not in ours
            ]
        # The reports log what a ReduceLROnPlateau may watch.
        return [FitReports(), self._manual]

    @override
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Log a value, once a batch: nothing happens in the second pass."""
        if not self.second_pass:
            super().log(name, *args, **kwargs)

    def losses_again(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The losses of an update's batches at the parameters as they are now, for callbacks.

        Without graphs, and without a trace in buffers, metrics, logs and random streams.

        Args:
            batch: The batch. If the aggregator ``needs_losses_after_step``, those of the latest
                update are run instead, as they were before it.
            batch_idx: Its index.
        """
        return self._fit.losses_again(self, partial(self._passes, batch, batch_idx))

    def _passes_again(self, inputs: Inputs, labels: dict[str, int]) -> Passes:
        self._labels = labels
        args, _ = inputs.take()
        return self._passes(*args)

    @property
    def backbone(self) -> nn.Module | None:
        """The encoder, by the name that Lightning's ``BackboneFinetuning`` looks for."""
        own = self._modules.get("backbone")  # of a subclass that has set one
        return self.encoder if own is None else own

    # What the present fit has; engine and latest step stay after it.

    @property
    def engine(self) -> MultiTaskStep:
        """The engine; ``engine.partition`` knows what is shared."""
        return self._fit.engine

    @property
    def aggregator(self) -> Aggregator | None:
        """The aggregator among the Trainer's callbacks."""
        aggregator: Aggregator | None = self._fit.aggregator
        return aggregator

    @property
    def sharpness(self) -> Sharpness | None:
        """The settings of the TaskSAM among the Trainer's callbacks."""
        return self._fit.sharpness

    @property
    def last_step(self) -> StepResult | None:
        """Losses and Gram matrices of the latest training step; ``None`` before the first."""
        return self._fit.last_step

    @property
    def second_pass(self) -> bool:
        """Whether the model is being run at perturbed parameters.

        What must happen once a batch, such as writing to ``self.logger.experiment``, asks this
        first. ``self.log`` and metrics do.
        """
        return self._fit.second_pass

    # Inside.

    @override
    def start_fit(self, trainer: Trainer) -> Fit:
        if self._fit.has_method:
            self._fit.close()
        self._fit = Fit(trainer, [task.name for task in self.tasks])
        if self._fit.has_method:
            share = self._manual.accumulate_grad_batches if self._fit.accumulates else 1
            refuse_unfit_gradients(self.gradients, self.sharpness, share)
        if self.gradients == "gram":
            refuse_unfit_for_gram(self.aggregator, trainer.world_size)
        return self._fit

    @override
    def declare_partition(self) -> None:
        """Begin with the parameters that the module declares; called once they all exist."""
        heads = {task.name: self.task_parameters(task) for task in self.tasks}
        self.engine.partition.declare(
            self.shared_parameters(),
            {t: params for t, params in heads.items() if params is not None},
        )

    @override
    def relative_improvement(self, stage: str, loader: int = 0) -> float | None:
        """Delta_m of the epoch, ``None`` without baselines or while a metric has no value."""
        fed = self.baselines is not None and self.task_metrics.fed(stage, loader, self.trainer)
        values = self.task_metrics.values(stage, loader) if fed else None
        if self.baselines is None or values is None:
            return None
        return delta_m(values, self.baselines, self.task_metrics.directions)

    @override
    def passes_of(self, batch: Any, batch_idx: int) -> Passes:
        """The passes of any batch, for who looks at the module without a trace."""
        self._labels = {}
        return self._passes(batch, batch_idx, again=True)

    @property
    @override
    def compilable(self) -> tuple[str, ...]:
        """The methods that ``torch.compile(module)`` is to compile in training."""
        return ("losses",) if self._overrides("losses") else ("encode", "task_output")

    @property
    def _stage(self) -> str | None:
        """What the Trainer is at, in the words of the logged names; ``None`` without one."""
        trainer = self._trainer
        if trainer is None:
            return None
        if trainer.validating or trainer.sanity_checking:
            return "val"
        return "train" if trainer.training else "test" if trainer.testing else None

    def _read(self, batch: Any, batch_idx: int) -> Passes:
        """The passes of a batch of training.

        With several processes an error is not raised here: the others would wait for this one.
        """
        try:
            if not (self._overrides("losses") or self._overrides("task_loss")):
                self._fit.watch.saw_targets(target_names(batch))
            passes = self._passes(batch, batch_idx)
            passes.without_matrix = self.gradients == "gram"
            return passes
        except Exception as error:
            if self.engine.processes.size == 1:
                raise
            return FailedPasses(error, self, planned=not self._overrides("losses"))

    def _passes(self, batch: Any, batch_idx: int, again: bool = False) -> Passes:
        if self._overrides("losses"):
            inputs = Inputs(batch, batch_idx) if again or self._fit.runs_again else None

            def losses() -> Mapping[str, Tensor]:
                args = (batch, batch_idx) if inputs is None else inputs.take()[0]
                return self._admitted(self._named(self.losses(*args)))

            return WholePasses(losses, self, self._muted, lambda t: self._samples(batch, t))
        return self._composed(batch)

    def _admitted(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The losses of a step, whose tasks a loaded state knows."""
        if self.aggregator is not None and not self.tasks:
            self.aggregator.admit(losses)
        return losses

    def _named(self, losses: Any) -> dict[str, Tensor]:
        """What ``losses`` has returned, refused if it is not by task; ``None`` is absent."""
        if not isinstance(losses, Mapping):
            got = type(losses).__name__
            got = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else got
            raise ValueError(
                f"`losses` must return a mapping from task names to scalar losses, got {got}. "
                'Return one loss for each task: {"a": loss_a, "b": loss_b}.'
            )
        found = {task: loss for task, loss in losses.items() if loss is not None}
        known = [task.name for task in self.tasks]
        unknown = [task for task in found if task not in known] if known else []
        if unknown:
            raise ValueError(
                f"`losses` must return losses of the tasks {known}, got one of '{unknown[0]}'. "
                f"{nearest(unknown[0], known)}Use the names of `tasks`, or add the task there. (A "
                "term that belongs to no task is the method `penalty`.)"
            )
        return {str(task): loss for task, loss in found.items()}

    def _composed(self, batch: Any) -> ComposedPasses:
        own_form = self._overrides("encode") and self._overrides("task_loss")
        batches = per_task(batch, self.tasks, own_form)
        by_name = {task.name: task for task in batches}

        def task_loss(name: str, features: Any, batch: Any) -> Tensor | None:
            return self.task_loss(by_name[name], features, batch)

        named = {task.name: part for task, part in batches.items()}
        at_features = self.gradients == "features" and self.training
        several = len(self.tasks) > 1
        return ComposedPasses(
            self.encode,
            task_loss,
            named,
            self,
            self._muted,
            at_features,
            several,
            lambda task: self._samples(batch, task),
        )

    def _muted(self) -> AbstractContextManager[None]:
        return self._fit.muted(self)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, loader: int) -> None:
        self._loader = loader
        self._labels = {}
        several = self.trainer.world_size > 1
        if several:
            self._log_in_step(stage)
        losses = self._named(self.losses(batch, batch_idx))
        check_scalars(losses)
        losses = {task: plain(loss).detach() for task, loss in losses.items()}
        if losses:
            self._log_losses(stage, losses, batch, sync_dist=several)
        if losses or several:
            self._log_total(stage, losses, batch)

    def _log_in_step(self, stage: str) -> None:
        """Let all processes log the same names: what one of them lacks the others would wait for.

        A value with no sample behind it weighs nothing.
        """
        nothing = torch.zeros((), device=self.device, dtype=self._log_dtype)
        for task in self.tasks if stage != "train" else ():
            name = log_name(stage, task.name, "loss")
            self.log(name, nothing, batch_size=0, sync_dist=True)
        for task in self.tasks:
            metrics = self.task_metrics.of_task(stage, self._loader, task.name)
            if metrics is not None:
                self._log_metrics(metrics)

    def _log_losses(
        self, stage: str, losses: Mapping[str, Tensor], batch: Any, sync_dist: bool = False
    ) -> None:
        # A sum of half-precision losses may overflow where none of them does.
        losses = {task: loss.to(_at_least_single(loss.dtype)) for task, loss in losses.items()}
        if sync_dist:  # of one type in all processes
            losses = {task: loss.to(self._log_dtype) for task, loss in losses.items()}
        if stage == "train":
            total = torch.stack(list(losses.values())).sum()
            self.log("train/loss", total, prog_bar=True, batch_size=batch_size(batch))
        for task, loss in losses.items():
            name, samples = log_name(stage, task, "loss"), self._samples(batch, task)
            self.log(name, loss, batch_size=samples, sync_dist=sync_dist)

    def _log_total(self, stage: str, losses: Mapping[str, Tensor], batch: Any) -> None:
        """The sum of what is logged of the tasks: a batch that lacks one counts for the others."""
        total = self.task_metrics.total(stage, self._loader, self.device)
        counts = {task: self._samples(batch, task) for task in losses}
        total.update(losses, counts, self._log_dtype)
        name = log_name(stage, "loss")
        self.log(name, total, prog_bar=True, on_step=False, on_epoch=True, metric_attribute=name)

    @property
    def _log_dtype(self) -> torch.dtype:
        return _at_least_single(next(self.parameters()).dtype)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        for name, metric in metrics.items(copy_state=False):
            self.log(name, metric, on_step=False, on_epoch=True, metric_attribute=name)

    def _samples(self, batch: Any, task: str) -> int:
        """How many samples of the batch have a label of the task."""
        return self._labels.get(task) or batch_size(batch, task)

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


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in config if key not in _SCHEDULER_KEYS]
    if unknown:
        raise ValueError(
            f"`lr_scheduler_config` must have keys among {list(_SCHEDULER_KEYS)}, got {unknown}."
        )
    frequency = config.get("frequency", 1)
    if not isinstance(frequency, int) or frequency < 1:
        raise ValueError(
            f"`frequency` in `lr_scheduler_config` must be an integer >= 1, got {frequency!r}."
        )
    return dict(config)
