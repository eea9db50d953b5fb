"""The door that every aggregator stands behind, and the two kinds that need one method only."""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, final, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatmtl.aggregators._loaded_tasks import LoadedTasks
from lightning_flatmtl.engine import NonFiniteError, TaskGradients, gram_matrix
from lightning_flatmtl.engine.aggregation import Part, Requires
from lightning_flatmtl.engine.gradients.combination import (
    refuse_infinite_direction,
    refuse_infinite_weights,
    weighted_rows,
)
from lightning_flatmtl.functional._gram import refuse_unreadable
from lightning_flatmtl.hosting.callback import MethodCallback
from lightning_flatmtl.hosting.host import Host

__all__ = ["Aggregator", "GramAggregator", "LossWeighting"]


class Aggregator(MethodCallback, ABC):
    """Combines the gradients of several tasks into one direction.

    In the callbacks of a Trainer it decides how a
    :class:`~lightning_flatmtl.MultiTaskModule` is trained. By itself it is a function on a matrix:
    ``aggregator(jacobian)`` maps ``[m, d]`` to ``[d]``.

    A new method overrides :meth:`aggregate`, or, simpler, derives from :class:`GramAggregator` (it
    needs the inner products of the gradients only) or :class:`LossWeighting` (it needs the losses
    only). The base has checked shapes and values before any of them is called. One that learns
    also overrides :meth:`get_state`, :meth:`set_state` and :meth:`reset`.

    What a method has learned belongs to the fit that it was learned in: a fit of another module or
    by another Trainer starts afresh, unless it resumes from a checkpoint or the state was loaded by
    :meth:`load_state_dict`. A Trainer that fits the same module further goes on.
    """

    role = "Aggregator"

    _last: tuple[tuple[str, ...], Tensor | None] | None = None
    """Tasks and loss weights of the last call for a loss part."""

    _before_step: tuple[int, dict[str, Any]] | None = None
    """The state before the present optimizer step and the step's number, under loss scaling."""

    _skipped = False
    """Whether the latest optimizer step was skipped for an overflow."""

    _tasks: tuple[str, ...] | None = None
    """The tasks of the module in training: those it declares, else those that have come so far."""

    _whole = True
    """Whether ``_tasks`` are all there are: they are declared, or an epoch has gone by."""

    _loaded: LoadedTasks | None = None
    """The tasks of the loaded state, to be compared with those that come."""

    _trained: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
    """Who is trained, or was last."""

    _in_run = False
    """Whether a Trainer is between its setup and its teardown."""

    _given = False
    """Whether a state was loaded by hand, for the fit to come."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the task gradients matter; if not, one backward pass of the weighted sum does."""
        return True

    @property
    def follows_scale(self) -> bool:
        """Whether gradients that are s times as long give a direction s times as long.

        If not, the directions of two matrices cannot be weighed against each other.
        """
        return True

    @property
    def is_plain_sum(self) -> bool:
        """Whether the losses are added with weights that never change, as in plain training.

        Then accumulated batches are added up as plain training does it: no task by itself.
        """
        return False

    @property
    def needs_losses_after_step(self) -> bool:
        """Whether the method asks for the losses of a batch again after the step."""
        return False

    @property
    def requires(self) -> Requires:
        """What of the Jacobian the method looks at; decides what several processes send.

        Its ``"gram"`` matrix only, its ``"columns"`` one by one, or the whole ``"matrix"``.
        """
        return "matrix"

    @property
    def needs_tasks(self) -> bool:
        """Whether the rows must be tasks', of which the method knows more than their gradients.

        That is their losses, preferences, or what was learned of them. If not, the Gram matrix
        alone decides, and the rows may be directions, as :class:`~lightning_flatmtl.TaskSAM` asks
        for with ``aggregate="second"`` or ``"each"``.
        """
        return True

    @property
    def weighs_losses(self) -> bool:
        """Whether the method weighs whole losses, heads included, by :meth:`loss_weights`."""
        return type(self).loss_weights is not Aggregator.loss_weights

    @property
    @override
    def state_key(self) -> str:
        return f"lightning_flatmtl.{type(self).__qualname__}"

    @final
    def __call__(
        self,
        jacobian: Tensor,
        *,
        losses: Tensor | Sequence[float] | None = None,
        tasks: Sequence[str] | None = None,
        part: Part = "loss",
    ) -> Tensor:
        """Aggregate a matrix of task gradients.

        Args:
            jacobian: Shape ``[m, d]``, one row per task, of a floating type.
            losses: The losses ``[m]``, for the methods that look at them.
            tasks: The names of the rows, for the methods that keep a state by task; by default
                ``"0", "1", ...``
            part: ``"loss"`` or ``"flat"``; a method with a state keeps one for each.

        Returns:
            The direction, shape ``[d]``, of the type and on the device of ``jacobian``.

        Raises:
            ValueError: If a shape is wrong.
            NonFiniteError: If an entry is NaN or infinite, or the direction would be; the message
                names the task.
        """
        if not isinstance(jacobian, Tensor) or jacobian.ndim != 2 or len(jacobian) == 0:
            got = list(jacobian.shape) if isinstance(jacobian, Tensor) else type(jacobian).__name__
            raise ValueError(
                "`jacobian` must be a tensor of shape [tasks, parameters] with at least one row, "
                f"got {got}."
            )
        _check_kind(jacobian)
        m = len(jacobian)
        names = tuple(str(i) for i in range(m)) if tasks is None else tuple(tasks)
        if len(names) != m or len(set(names)) != m:
            raise ValueError(
                f"`tasks` must name {m} rows, got {len(set(names))} different names: {names}."
            )
        if part not in get_args(Part):
            raise ValueError(f"`part` must be 'loss' or 'flat', got {part!r}.")
        values = None
        if losses is not None:
            values = _checked_losses(losses, names)
        with torch.no_grad():
            gram = gram_matrix(jacobian).cpu()
            for name, square in zip(names, gram.diagonal().tolist(), strict=True):
                if not square < torch.inf:
                    raise _not_finite(name, jacobian[names.index(name)])
            # The flat part of a step has the weights of its loss part.
            if part == "loss" or self._last is None or self._last[0] != names:
                self._last = names, self.loss_weights(names, values)
            weights = self._last[1]
            refuse_infinite_weights(weights, names, self)
            shown = TaskGradients(jacobian.detach(), gram, names, values, weights, part)
            direction = self.aggregate(shown)
            refuse_infinite_direction(bool(direction.isfinite().all()), shown, self)
            return direction

    @abstractmethod
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The direction ``[d]`` for the gradients ``[m, d]`` of one part of a step."""

    def row_weights(self, gradients: TaskGradients) -> Tensor | None:
        """Weights ``[m]`` of the rows, if the direction is a weighted sum of them.

        With them the engine combines the rows itself, in memory that it has; without, it asks
        :meth:`aggregate`.
        """
        return None

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        """Weights ``[m]`` of the whole losses, heads included; ``None`` for all ones.

        Called once a step, before ``aggregate``.
        """
        return None

    # State: leaves give and take a mapping; that of a task is kept under the task's name.

    def get_state(self) -> dict[str, Any]:
        """What has to survive a restart: tensors, numbers, strings, and mappings of them."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state`."""

    def reset(self) -> None:
        """Forget everything learned and start afresh, as if made anew.

        A Trainer does this where a fit begins; whoever calls the aggregator by hand does it between
        two trainings. A method with a state overrides it, and calls it on ``super()``.
        """
        self._last = None
        self._before_step = None
        self._skipped = False
        self._loaded = None

    @final
    @override
    def state_dict(self) -> dict[str, Any]:
        state = self.get_state()
        if not state:
            return {}
        return {"tasks": list(self._tasks or ()), "whole": self._whole, **state}

    @final
    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        loaded = LoadedTasks(
            type(self).__name__, state.pop("tasks", []), whole=state.pop("whole", True)
        )
        loaded.refuse_others(self._tasks)
        if state:
            self.set_state(state)
        self._loaded = loaded
        self._given = not self._in_run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._in_run = True
        self._before_step = None
        self._skipped = False
        if stage == "fit":
            self._begin_fit(trainer, pl_module)

    def _begin_fit(self, trainer: Trainer, module: LightningModule) -> None:
        """Forget what was learned in a fit of others, and know the tasks of this one."""
        same = self._trained is not None and (self._trained[0](), self._trained[1]()) == (
            trainer,
            module,
        )
        if not same and not self._given:
            self._refuse_lasting_state()
            self.reset()
        self._given = False
        self._trained = weakref.ref(trainer), weakref.ref(module)
        declared = getattr(module, "tasks", ()) if isinstance(module, Host) else ()
        if declared or not same:
            self._tasks = tuple(str(task) for task in declared)
            self._whole = bool(declared)
        if self._loaded is not None:
            self._loaded.refuse_others(self._tasks)

    def _refuse_lasting_state(self) -> None:
        kind = type(self)
        if self._trained is None or kind.reset is not Aggregator.reset or not self.get_state():
            return
        raise MisconfigurationException(
            f"{kind.__name__} still has the state of an earlier fit, and no `reset` to forget it. "
            f"Override `reset`, or make a new {kind.__name__} for every fit."
        )

    # Tasks of a module that declares none are known from its losses.

    def admit(self, tasks: Iterable[str]) -> None:
        """Refuse tasks of a batch that the loaded state does not know.

        Raises:
            ValueError: If there are any and all tasks were known when the state was saved.
        """
        if self._loaded is not None:
            self._loaded.admit(tasks)

    def note_tasks(self, tasks: Iterable[str], *, whole: bool) -> None:
        """Note the tasks of a step of a module that declares none.

        Args:
            tasks: The tasks that any process has.
            whole: Whether an epoch ends here, so that all tasks have been seen.
        """
        self._tasks = tuple(dict.fromkeys((*(self._tasks or ()), *tasks)))
        self._whole = self._whole or whole
        if whole and self._loaded is not None:
            self._loaded.tell_missing(self._tasks)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._in_run = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._in_run = False

    # An overflow under loss scaling skips the optimizer step; then nothing has been learned here.

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not _scaled(trainer):
            return
        if self._before_step is None or self._before_step[0] != trainer.global_step:
            self._before_step = trainer.global_step, deepcopy(self.get_state())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._skipped = _scaled(trainer) and not _finite_gradients(optimizer)
        if self._skipped and self._before_step is not None and self._before_step[1]:
            self.set_state(deepcopy(self._before_step[1]))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has been in no fit.
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_trained", "_in_run")}

    def _repr_arguments(self) -> dict[str, Any]:
        """The constructor's arguments, for :func:`repr`."""
        lent = ("log", "log_dict")  # the module's, which Lightning hangs on every callback
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in lent}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self._repr_arguments().items())
        return f"{type(self).__name__}({arguments})"


_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_kind(jacobian: Tensor) -> None:
    """Refuse tensors whose entries cannot be computed with."""
    if jacobian.dtype not in _TYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise ValueError(
            f"`jacobian` must be of a floating type among {names}, got {jacobian.dtype}."
        )
    refuse_unreadable("jacobian", jacobian)


def _not_finite(task: str, row: Tensor) -> NonFiniteError:
    if row.isfinite().all():
        return NonFiniteError(
            f"The gradient of task '{task}' must be shorter than 1e154, whose square float64 can "
            f"hold, got one with an entry of {row.abs().max():.2g}. Scale the losses down."
        )
    return NonFiniteError(
        f"The gradient of task '{task}' must be finite, got NaN or infinity in its row."
    )


def _checked_losses(losses: Tensor | Sequence[float], tasks: tuple[str, ...]) -> Tensor:
    given = losses.detach() if isinstance(losses, Tensor) else losses
    values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    if values.shape != (len(tasks),):
        raise ValueError(f"`losses` must have shape [{len(tasks)}], got {list(values.shape)}.")
    for task, value in zip(tasks, values.tolist(), strict=True):
        if not abs(value) < torch.inf:
            raise NonFiniteError(f"The loss of task '{task}' must be finite, got {value}.")
    return values


def _scaled(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _finite_gradients(optimizer: Optimizer) -> bool:
    params = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in params if p.grad is not None]
    return not gradients or bool(get_total_norm(gradients, norm_type=math.inf).isfinite())


class GramAggregator(Aggregator):
    """A method whose direction is a weighted sum of the rows, the weights a function of the Gram.

    A new method overrides :meth:`weights`.
    """

    @property
    @override
    def requires(self) -> Requires:
        return "gram"

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.weighs_losses

    @abstractmethod
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        """Weights ``[m]`` of the rows.

        Args:
            gram: Inner products of the rows, each row multiplied by its loss weight, ``[m, m]``,
                float64 on the CPU.
            gradients: All that is known.
        """

    @final
    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor:
        scale = gradients.loss_weights
        if scale is None:
            return self.weights(gradients.gram, gradients)
        gram = gradients.gram * scale[:, None] * scale[None, :]
        return self.weights(gram, gradients) * scale

    @final
    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return weighted_rows(self.row_weights(gradients), gradients, self)


class LossWeighting(Aggregator):
    """A method that weighs the losses, heads included, and looks at no gradient.

    A new method overrides :meth:`loss_weights`.
    """

    @property
    @override
    def needs_gradients(self) -> bool:
        return False

    @property
    @override
    def requires(self) -> Requires:
        return "gram"

    @abstractmethod
    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None: ...

    @final
    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor:
        if gradients.loss_weights is None:
            return torch.ones(len(gradients.tasks), dtype=torch.float64)
        return gradients.loss_weights

    @final
    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return weighted_rows(self.row_weights(gradients), gradients, self)
