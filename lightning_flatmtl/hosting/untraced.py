"""Running a module once more, for a callback that only looks: nothing of it stays."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_flatmtl.engine import Passes, RNGReplay, WholePasses
from lightning_flatmtl.engine.checks import check_scalars
from lightning_flatmtl.engine.gradients.perturbed import moved
from lightning_flatmtl.engine.gradients.radius import Move
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.passes.inputs import Inputs, own_copy
from lightning_flatmtl.engine.passes.state_guards import frozen_module, frozen_parameters_unmoved
from lightning_flatmtl.hosting.automatic import (
    TakeOver,
    count_of,
    host_of,
    looked_at_now,
    task_losses,
)
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.muting import logs_silenced, metrics_unmoved

__all__ = ["Look", "looking_at", "perturbed", "refuse_unfit_to_look_at", "untraced"]


@contextmanager
def untraced(module: LightningModule, *, evaluate: bool = False) -> Iterator[Callable[[], None]]:
    """Run the block and leave no trace of it in the module, its logs and the random streams.

    ``self.log`` does nothing and :func:`~lightning_flatmtl.takeover.second_pass` is true meanwhile;
    buffers, metrics, plain attributes, modes and the random streams are afterwards as before, after
    an error too. Parameters are not guarded; see :func:`perturbed`. In the block tensors have
    graphs, also where the Trainer evaluates in inference mode. Batches are guarded by
    :func:`looking_at`, or copied by :func:`~lightning_flatmtl.engine.passes.inputs.own_copy`.

    Yields a function that winds module and random streams back to where the block began, so that
    a further run draws the same masks.

    Args:
        module: Any LightningModule in the hands of a Trainer.
        evaluate: Whether the module is in evaluation mode meanwhile; else it is left in its own.
    """
    tape = RNGReplay(module.device)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _evaluating(module) if evaluate else nullcontext(),
        _noted(),
        frozen_module(module) as put_back,
        _muted(module),
        tape.replaying(),
    ):
        tape.mark("begin")

        def wind_back() -> None:
            put_back()
            tape.rewind("begin")

        yield wind_back


class Look:
    """The losses of one batch at the parameters as they are, as often as they are asked for.

    Every time with the same random numbers, on the batch as it came. Made by :func:`looking_at`.

    Args:
        module: The module.
        inputs: Batch and index.
        wind_back: Takes module and random streams back to the begin.
        size: How many samples a loss is the mean of where the module does not say it.
    """

    def __init__(
        self,
        module: LightningModule,
        inputs: Inputs,
        wind_back: Callable[[], None],
        size: float = 1.0,
    ) -> None:
        self.module = module
        self._inputs, self._wind_back = inputs, wind_back
        self._size = size
        self._passes: Passes | None = None
        self.counts: dict[str, float] = {}
        """How many samples each of the latest losses is the mean of."""

    def losses(self) -> dict[str, Tensor]:
        """The losses of the tasks that the batch has, with their graphs.

        The mean over no samples is no loss; such a task is absent.
        """
        self._wind_back()
        (batch, batch_idx), _ = self._inputs.take()
        passes = _passes_of(self.module, batch, batch_idx, self._size)
        passes.begin_at(self._wind_back)
        passes.keep_start()
        with self._running():
            losses = passes.clean()
            check_scalars(losses)
            counts = {task: passes.count(task) for task in losses}
        self.counts = {task: n for task, n in counts.items() if n > 0}
        self._passes = passes
        return {task: losses[task] for task in self.counts}

    def again(self, task: str) -> Tensor:
        """The loss of one task once more, with its graph, after :meth:`losses`.

        Where the model is made of encoder and heads, the other heads do not run.
        """
        assert self._passes is not None, "ask for `losses` first"
        with self._running():
            return self._passes.again(task)

    @property
    def common(self) -> set[Any]:
        """Parameters that all tasks reach, those that the batch lacks too, after :meth:`losses`."""
        return set() if self._passes is None else self._passes.common

    @contextmanager
    def _running(self) -> Iterator[None]:
        precision = self.module.trainer.precision_plugin
        with precision.forward_context(), frozen_parameters_unmoved(self.module):
            yield


@contextmanager
def looking_at(
    module: LightningModule,
    batch: Any,
    batch_idx: int,
    *,
    evaluate: bool = False,
    size: float = 1.0,
) -> Iterator[Look]:
    """Look at the task losses of a batch, without a trace.

    Those of a :class:`~lightning_flatmtl.MultiTaskModule` are what ``losses`` computes, those of
    any other module the ``"losses"`` that its ``training_step`` returns, on validation batches too.

    Args:
        module: The module; see :func:`untraced`.
        batch: The batch, on the module's device; it is copied.
        batch_idx: Its index.
        evaluate: Whether the module is in evaluation mode meanwhile; else it is left in its own.
        size: How many samples a loss counts as the mean of where the module returns no
            ``"counts"``: as in training all batches weigh the same by default.

    Example:
        >>> def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ...     with looking_at(pl_module, batch, batch_idx) as look:
        ...         before = look.losses()
        ...         with perturbed(params, steps):
        ...             after = look.losses()
    """
    with untraced(module, evaluate=evaluate) as wind_back:
        yield Look(module, Inputs(own_copy(batch), batch_idx), wind_back, size)


def perturbed(
    params: Sequence[Tensor], steps: Sequence[Tensor], factor: float = 1.0
) -> AbstractContextManager[None]:
    """Run a block at ``params + factor * steps``, then put the exact old values back.

    Args:
        params: Parameters, all on one device.
        steps: A tensor for each, of its shape.
        factor: What the steps are multiplied by.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.1]))
        >>> with perturbed([weight], [torch.tensor([0.3])], factor=2.0):
        ...     moved = round(weight.item(), 6)
        >>> moved, round(weight.item(), 6)
        (0.7, 0.1)
    """
    layout = FlatParameters(params)
    return moved(layout, layout.values(), Move(layout.flatten(steps), factor))


def refuse_unfit_to_look_at(module: LightningModule, name: str) -> None:
    """Refuse a module whose task losses a callback cannot ask for.

    Args:
        module: The module.
        name: That of the callback.

    Raises:
        MisconfigurationException: If it optimizes by hand or fetches its batches itself.
    """
    if isinstance(module, Host):
        return
    kind = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} expects a MultiTaskModule or a module with automatic optimization, got {kind} "
            "with `automatic_optimization = False`, whose `training_step` cannot be run without a "
            "step of its optimizers. Remove the callback, or derive the module from "
            "lightning_flatmtl.MultiTaskModule and override `losses`."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"{name} expects `training_step(self, batch, batch_idx)`, got one of {kind} with "
            "`dataloader_iter`, which cannot be run twice on the same batch. Take the batch as an "
            "argument."
        )


def _passes_of(module: LightningModule, batch: Any, batch_idx: int, size: float) -> Passes:
    host = host_of(module)
    if isinstance(host, Host):
        return host.passes_of(batch, batch_idx)
    step = host.original if isinstance(host, TakeOver) else module.training_step
    args = (batch, batch_idx)[: _positional(step)]
    inputs = Inputs(*args)
    outputs: Any = None

    def losses() -> Mapping[str, Tensor]:
        nonlocal outputs
        given, _ = inputs.take()
        outputs = step(*given)
        return task_losses(outputs, "To look at the losses of tasks")

    return WholePasses(losses, module, count=lambda task: count_of(outputs, task, size))


def _positional(step: Callable[..., Any]) -> int:
    """How many of batch and index a ``training_step`` takes, which may be the batch alone."""
    try:
        inspect.signature(step).bind(None, 0)
    except TypeError:
        return 1
    return 2


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    host = host_of(module)
    if isinstance(host, TakeOver):
        with host.muted():
            yield
    elif isinstance(host, Host):
        with host._fit.muted(module):
            yield
    else:
        with logs_silenced(module), metrics_unmoved(module):
            looked_at_now.add(module)
            try:
                yield
            finally:
                looked_at_now.discard(module)


@contextmanager
def _evaluating(module: LightningModule) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _noted() -> Iterator[None]:
    """Let every error of the block say that it is not the step itself that has failed."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "A callback that only looks was running the module on this batch, beside the step. "
            "Look for what the module can do only once a batch; "
            "`lightning_flatmtl.takeover.second_pass(self)` is true meanwhile."
        )
        raise
