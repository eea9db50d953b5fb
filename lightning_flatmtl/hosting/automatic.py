"""Algorithm 1 inside a LightningModule with automatic optimization that knows nothing of it."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils import _pytree as pytree

from lightning_flatmtl.engine import MultiTaskStep, StepResult, WholePasses, surrogate_loss
from lightning_flatmtl.engine.gradients.accumulation import ALONE, Place
from lightning_flatmtl.engine.passes.base import plain
from lightning_flatmtl.engine.passes.inputs import Inputs
from lightning_flatmtl.hosting.fit import Fit
from lightning_flatmtl.hosting.muting import logs_silenced
from lightning_flatmtl.hosting.refusals import refuse_unfit_trainer
from lightning_flatmtl.hosting.untouched import UntouchedGradients

__all__ = ["TakeOver", "count_of", "declared_by", "host_of", "second_pass", "task_losses"]

looked_at_now: WeakSet[nn.Module] = WeakSet()
"""Modules without a host that a callback is running at the moment, only to look."""

_EXPECTED = (
    '`training_step` must return {"loss": total, "losses": {"a": loss_a, "b": loss_b}} with a '
    "scalar loss for every task"
)


class TakeOver:
    """Stands in for the ``training_step`` of an existing module during one fit.

    An aggregator or a TaskSAM in the Trainer's callbacks puts it there; a user never makes one.
    Called as ``training_step``, it runs the module's own one for the task losses, runs the engine,
    and returns a loss whose value is the module's and whose gradient is what the engine computed.
    Everything after that (loss scaling, accumulation, clipping, the optimizer step, schedulers,
    checkpoints) is Lightning's automatic optimization and none the wiser.

    With several processes a task's loss counts as the mean over ``outputs["counts"][task]``
    samples, if the module returns such ``"counts"``; else all processes weigh the same.

    The second pass runs ``training_step`` again, with the same batch and the same random numbers.
    ``self.log`` does nothing then, metrics of torchmetrics, buffers and plain attributes are put
    back, the batch is as it first was, and :func:`second_pass` is true.

    What is shared is found from the graph of the losses. A module may say it itself with methods
    ``shared_parameters()`` and ``task_parameters(name)``, as a
    :class:`~lightning_flatmtl.MultiTaskModule` does.

    Args:
        trainer: The Trainer of the fit.
        module: The module to train.

    Raises:
        MisconfigurationException: If the module cannot be taken over.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        refuse_unfit_module(module)
        refuse_unfit_trainer(trainer)
        self.fit = Fit(trainer)
        self._untouched = UntouchedGradients()
        self._trainer = trainer
        self._module = module
        left_over = vars(module).get("training_step")
        if isinstance(left_over, TakeOver):  # a fit that has ended badly could not give it back
            left_over.give_back()
        self._own = vars(module).get("training_step")  # set by hand or by torch.compile
        self._original = module.training_step
        # Lightning reads the signature through this, one level deep.
        self.__wrapped__ = inspect.unwrap(self._original)
        self._step_untouched: Sequence[Tensor] | None = ()
        self._total_seen = self._total_told = False
        module.training_step = self  # type: ignore[method-assign]

    # What a host has, as a MultiTaskModule has it.

    @property
    def engine(self) -> MultiTaskStep:
        """The engine; ``engine.partition`` knows what is shared."""
        return self.fit.engine

    @property
    def last_step(self) -> StepResult | None:
        """Losses and Gram matrices of the latest training step; ``None`` before the first."""
        return self.fit.last_step

    @property
    def second_pass(self) -> bool:
        """Whether the module is being run at perturbed parameters."""
        return self.fit.second_pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step of Algorithm 1 in the place of the module's ``training_step``."""
        mine = self._module._trainer is self._trainer  # else the fit that this is for is over
        if not torch.is_grad_enabled() or not mine:
            return self._original(*args, **kwargs)
        fit, place = self.fit, self._place()
        several = fit.needs_losses_after_step or fit.runs_again
        inputs = Inputs(*args, **kwargs) if several else None
        if fit.needs_losses_after_step and inputs is not None:
            fit.keep(partial(self._again, inputs), place)
        outputs: Any = None

        def losses() -> Mapping[str, Tensor]:
            nonlocal outputs
            args_, kwargs_ = (args, kwargs) if inputs is None else inputs.take()
            given = self._original(*args_, **kwargs_)
            found = task_losses(given)
            if not fit.second_pass:
                outputs = given
                self._declare_heads(found)
                if fit.aggregator is not None:
                    fit.aggregator.admit(found)
            return found

        passes = WholePasses(losses, self._module, self.muted, lambda t: count_of(outputs, t))
        passes.penalty = lambda: plain(outputs.get("penalty"))
        result = fit.run(self._module, passes, place)
        waits = result is not None and result.loss is None  # for the rest of its update
        self._step_untouched = None if waits else () if result is None else result.untouched
        if result is None:
            return self._nothing() if fit.engine.processes.size > 1 else None
        return self._outputs(outputs, result)

    def losses_again(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The losses of the latest update's batches, at the parameters as they are now.

        For callbacks. Without graphs, and without a trace in buffers, metrics, logs and random
        streams.
        """
        return self.fit.losses_again(self._module)

    def _again(self, inputs: Inputs) -> WholePasses:
        args, kwargs = inputs.take()
        outputs: Any = None

        def losses() -> Mapping[str, Tensor]:
            nonlocal outputs
            outputs = self._original(*args, **kwargs)
            return task_losses(outputs)

        return WholePasses(
            losses, self._module, self.muted, count=lambda task: count_of(outputs, task)
        )

    def _place(self) -> Place:
        """The place of the present batch among those that the Trainer makes one update of."""
        trainer, share = self._trainer, self._share
        if share == 1:
            return ALONE
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "LBFGS runs a batch several times in an update, which does not go together with "
                f"Trainer(accumulate_grad_batches={share}). Use another optimizer, or no "
                "accumulation."
            )
        ready = self._ready
        ends = trainer.is_last_batch or ready == trainer.num_training_batches
        return Place(first=(ready - 1) % share == 0, last=ready % share == 0 or ends)

    @property
    def _share(self) -> int:
        """How many batches the engine makes one update of; fewer at the end of an epoch."""
        return self._trainer.accumulate_grad_batches if self.fit.accumulates else 1

    @property
    def _ready(self) -> int:
        """How many batches of the epoch have come, the present one among them."""
        ready: int = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return ready

    def declare_shared(self) -> None:
        """Begin with the shared parameters that the module declares; called once they all exist."""
        self._declare(shared=declared_by(self._module, "shared_parameters") or ())

    def before_zero_grad(self) -> None:
        """A new group of accumulated batches begins."""
        self._untouched.begin()

    def after_backward(self) -> None:
        """What no process's losses reach has no gradient."""
        if self._step_untouched is None:
            return
        self._untouched.after_backward(self._module.parameters(), self._step_untouched)

    def give_back(self) -> None:
        """Put the module's own ``training_step`` back."""
        self.fit.close()
        if vars(self._module).get("training_step") is self:
            del self._module.training_step
            if self._own is not None:
                self._module.training_step = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the module (weight averaging makes some) has its own plain training_step.
        return deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._original,)

    def _nothing(self) -> dict[str, Tensor]:
        """A loss for a batch without any: its backward pass still brings the processes together.

        Lightning sums up accumulated gradients with the last batch of a group only.
        """
        params = [p for p in self._module.parameters() if p.requires_grad]
        self._step_untouched = params
        zero = torch.zeros((), device=self._module.device)
        return {"loss": surrogate_loss(zero, params, [torch.zeros_like(p) for p in params])}

    def _outputs(self, outputs: Any, result: StepResult) -> dict[str, Any]:
        """What the module returned, without graphs and with the engine's loss in it."""
        outputs = pytree.tree_map_only(Tensor, Tensor.detach, dict(outputs or {}))
        loss = result.total.detach().requires_grad_() if result.loss is None else result.loss
        total = plain(outputs.get("loss"))
        if isinstance(total, Tensor) and total.ndim:
            raise MisconfigurationException(
                f'"loss" must be a scalar tensor, got a tensor of shape {list(total.shape)}. '
                "Reduce it, for example with `.mean()`."
            )
        if not isinstance(total, Tensor):
            total = loss.detach()
        elif result.overflow is None:
            self._check_total(total, outputs)
        if self._share > 1:
            # Lightning divides by the full number of batches; the engine has taken the mean.
            loss = loss * ((self._ready - 1) % self._share + 1)
        # The module's value with the engine's gradient.
        loss = loss + (total - loss.detach())
        return {**outputs, "loss": loss, "losses": result.losses}

    def _check_total(self, total: Tensor, outputs: Mapping[str, Any]) -> None:
        """Say once that a part of the total is not trained, as this process has it.

        Looked at in the first step and in those that log, where the numbers come to the host
        anyway.
        """
        losses = task_losses(outputs)
        logs = self._trainer._logger_connector.should_update_logs
        if self._total_told or not losses or (self._total_seen and not logs):
            return
        self._total_seen = True
        terms = [total, *losses.values()]
        penalty = plain(outputs.get("penalty", 0.0))
        if isinstance(penalty, Tensor):
            terms.append(penalty)
        values = torch.stack([term.to(total.device, torch.float64) for term in terms]).tolist()
        given, *parts = [*values, 0.0 if isinstance(penalty, Tensor) else float(penalty or 0.0)]
        summed = math.fsum(parts)
        # What a sum of so many terms in their type may be off by.
        rounding = max(torch.finfo(term.dtype).eps for term in terms) * (len(terms) + 2)
        missing = given - summed
        if abs(missing) > rounding * (abs(given) + math.fsum(map(abs, parts))):
            self._total_told = True
            rank_zero_warn(
                f'"loss" is {given:.6g} and the "losses" (with the "penalty", if there is one) sum '
                f"to {summed:.6g}: {missing:.3g} of the total is not trained. With an aggregator "
                'or TaskSAM only the "losses" and the "penalty" are: weigh the losses themselves, '
                "add an auxiliary loss to one of them, and return what belongs to no task (a "
                'penalty) as {"loss": total, "losses": {...}, "penalty": term}.',
                category=UserWarning,
            )

    def _declare_heads(self, losses: Mapping[str, Tensor]) -> None:
        if not hasattr(self._module, "task_parameters"):
            return
        for task in losses:
            if task not in self.fit.engine.partition.seen:
                self._declare(
                    heads={task: declared_by(self._module, "task_parameters", task) or ()}
                )

    def _declare(
        self, shared: Iterable[Any] | None = None, heads: dict[str, Any] | None = None
    ) -> None:
        self.fit.engine.partition.declare(shared, heads)

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own ``training_step``."""
        return self._original

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Around a further pass: it logs nothing, is known as one, and metrics stay."""
        with logs_silenced(self._module), self.fit.muted(self._module):
            yield


def second_pass(module: LightningModule) -> bool:
    """Whether ``module`` is being run once more: at perturbed parameters, or to be looked at.

    What must happen once a batch and cannot be put back from outside, such as writing to
    ``self.logger.experiment``, ``print`` or ``next`` of an iterator, asks this first.

    Args:
        module: Any LightningModule, usually ``self`` in its ``training_step``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> second_pass(BoringModel())
        False
    """
    return module in looked_at_now or bool(getattr(host_of(module), "second_pass", False))


def host_of(module: LightningModule) -> Any:
    """What runs the steps of ``module``: itself, or the take-over that stands in for it."""
    step = vars(module).get("training_step")
    return step if isinstance(step, TakeOver) else module


def refuse_unfit_module(module: LightningModule) -> None:
    """Refuse a module whose steps cannot be run again or are not Lightning's.

    Raises:
        MisconfigurationException: If it optimizes by hand or fetches its batches itself.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected a module with automatic optimization or a MultiTaskModule, got {name} with "
            "`automatic_optimization = False`, which steps its optimizers itself. Let "
            '`training_step` return {"loss": total, "losses": {task: loss}} and remove the manual '
            "optimization (several optimizers become one with several parameter groups), or derive "
            "it from lightning_flatmtl.MultiTaskModule and override `losses`."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"Expected `training_step(self, batch, batch_idx)`, got one of {name} with "
            "`dataloader_iter`, which cannot be run twice on the same batch. Take the batch as an "
            "argument."
        )


def task_losses(outputs: Any, when: str = "With an aggregator or TaskSAM") -> dict[str, Tensor]:
    """The losses in what a ``training_step`` returned; a task with ``None`` is absent."""
    if outputs is None:
        return {}
    if not isinstance(outputs, Mapping) or "losses" not in outputs:
        got = (
            f"a mapping with the keys {list(outputs)}"
            if isinstance(outputs, Mapping)
            else (type(outputs).__name__)
        )
        raise MisconfigurationException(f"{when} {_EXPECTED}, got {got}.")
    losses = outputs["losses"]
    if not isinstance(losses, Mapping):
        raise MisconfigurationException(
            f'{when} {_EXPECTED}, got {type(losses).__name__} for "losses".'
        )
    unnamed = [task for task in losses if not isinstance(task, str)]
    if unnamed:
        raise MisconfigurationException(
            f'The tasks in "losses" must be named by strings, got {unnamed}.'
        )
    return {task: plain(loss) for task, loss in losses.items() if loss is not None}


def count_of(outputs: Any, task: str, otherwise: float = 1.0) -> float:
    """How many samples a task's loss is the mean of, if the module says so."""
    counts = outputs.get("counts")
    if not isinstance(counts, Mapping):  # none, or something of the module's own
        return otherwise
    if task not in counts:
        raise MisconfigurationException(
            f'"counts" must have the number of samples behind every loss, got {dict(counts)} '
            f"without task '{task}'."
        )
    return float(counts[task])


def declared_by(module: LightningModule, name: str, *args: Any) -> list[nn.Parameter] | None:
    """What the module's own method ``name`` declares, ``None`` if it has none."""
    method = getattr(module, name, None)
    if not callable(method):
        return None
    try:
        inspect.signature(method).bind(*args)
        given = method(*args)
        declared = None if given is None else list(given)
    except TypeError as error:
        raise MisconfigurationException(
            f"`{name}({', '.join(map(repr, args))})` of {type(module).__name__} must return "
            f"parameters or None, got: {error}. Rename the method if it is for something else."
        ) from error
    if declared is not None and not all(isinstance(p, nn.Parameter) for p in declared):
        kinds = sorted({type(p).__name__ for p in declared})
        raise MisconfigurationException(
            f"`{name}` of {type(module).__name__} must return parameters, such as "
            f"`self.encoder.parameters()`, got a list of {kinds}."
        )
    return declared


def _itself(original: Any) -> Any:
    return original
