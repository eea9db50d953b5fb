"""Algorithm 1 of *Improving Multi-task Learning via Seeking Task-based Flat Regions*."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.backward import BackwardBlocks, observe_by_backward, set_aside
from lightning_flatmtl.engine.errors import NonFiniteError, ScaledOverflowError
from lightning_flatmtl.engine.features import FeatureBlocks
from lightning_flatmtl.engine.gradients import (
    Aggregation,
    Part,
    SumOfLosses,
    TaskGradients,
    weighted_rows,
)
from lightning_flatmtl.engine.jacobian import (
    Ascent,
    Blocks,
    Gradients,
    Measures,
    measure,
    measure_second,
    share_of,
    task_gradients,
)
from lightning_flatmtl.engine.partition import Partition, reached_parameters
from lightning_flatmtl.engine.passes import Passes
from lightning_flatmtl.engine.perturbation import sam_gradients
from lightning_flatmtl.engine.processes import Alone, Processes, synchronised_layers
from lightning_flatmtl.engine.sharded import ShardedBlocks, reshard
from lightning_flatmtl.engine.sharpness import Sharpness
from lightning_flatmtl.engine.surrogate import surrogate_loss
from lightning_flatmtl.engine.workspace import Workspace

__all__ = ["MultiTaskStep", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one step found out.

    Args:
        loss: The scalar to call ``backward`` on; its gradient is what the step decided.
        losses: The clean losses by task, detached.
        gram: Inner products of the clean task gradients ``[m, m]``, float64 on the CPU; ``None``
            when the step did not need them.
        flat_gram: The same for the flat parts; ``None`` without a split second pass.
        dead: Whether every task gradient was exactly zero.
        overflow: What was not finite under loss scaling, in words; then the gradients are infinite,
            so that the scaler skips the step.
        untouched: Parameters that no process's losses reach: with several processes they get
            gradients of zero, which the host takes away again after the backward pass.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    gram: Tensor | None = None
    flat_gram: Tensor | None = None
    dead: bool = False
    overflow: str | None = None
    untouched: Sequence[Tensor] = ()

    @property
    def total(self) -> Tensor:
        """The unweighted sum of the losses, detached."""
        return torch.stack(list(self.losses.values())).sum()

    def detached(self) -> "StepResult":
        """The same without the graph and the gradients that ``loss`` holds on to."""
        return replace(self, loss=self.loss.detach())


class MultiTaskStep:
    r"""One training step of a multi-task model: Algorithm 1 of the flat-minima paper.

    Phan et al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_.

    For every task i the gradient :math:`g_i` of its loss, a perturbation of the shared and of the
    head parameters along it, and the gradient :math:`s_i` there. The shared parameters follow
    :math:`A(g_1, \dots, g_m) + A(s_1 - g_1, \dots, s_m - g_m)` for an aggregation :math:`A`, each
    head its own SAM gradient.

    The object keeps what outlives a step: the partition and the memory.

    Args:
        partition: Which parameters are shared and which belong to a head; by default it is found
            from the graphs of the losses.
        processes: The processes that share every step; by default this one alone.
    """

    def __init__(
        self, partition: Partition | None = None, processes: Processes | None = None
    ) -> None:
        self.partition = Partition() if partition is None else partition
        self.processes = Alone() if processes is None else processes
        self._workspace = Workspace()
        self._waiting = False
        self._probed: set[str] = set()

    def __call__(
        self,
        module: nn.Module,
        passes: Passes,
        aggregation: Aggregation | None = None,
        sharpness: Sharpness | None = None,
        scale: Tensor | None = None,
        last: bool = False,
    ) -> StepResult | None:
        """Run the passes and return the loss to differentiate.

        Args:
            module: Its trainable parameters are trained.
            passes: Computes the losses, cleanly and again.
            aggregation: The aggregator; the plain sum of the losses if none is given.
            sharpness: The perturbations; ``None`` or radii of zero is the plain method, with no
                second pass.
            scale: The loss scale of 16-bit training, a scalar: the backward passes run on scaled
                losses, everything else sees true gradients. What is not finite then overflowed.
            last: Whether this process has no batch after this one.

        Returns:
            The result, or ``None`` when no process has any loss.

        Raises:
            ValueError: If a loss is not a scalar or reaches no trainable parameter.
            NonFiniteError: If a loss or a task gradient is NaN or infinite, without loss scaling.
            ProcessError: If another process cannot go on.
        """
        aggregation = SumOfLosses() if aggregation is None else aggregation
        if sharpness is not None and not sharpness.active:
            sharpness = None
        if self.processes.sharded:
            reshard(module)
        # Before the passes: sharded layers show other parameters during them.
        named = dict(module.named_parameters())
        trainable = [p for p in named.values() if p.requires_grad]
        if sharpness is not None:
            passes.keep_start()
            by_head = sharpness.point == "separate" and sharpness.moves_heads
            if by_head and not self.processes.sharded:
                seen = self.partition.seen
                passes.expect_heads([self.partition.head(task, trainable) for task in seen])
        self._waiting = self.processes.size > 1 and bool(synchronised_layers(module))
        by_task = sharpness is not None or aggregation.needs_gradients or self.processes.sharded
        losses, shares = self._clean_losses(module, named, passes, last, by_task)
        if not shares:
            return None
        if not by_task:
            return _weighted_sum(
                losses, shares, trainable, aggregation, scale, self.processes, self.partition
            )
        self.partition.refuse_hidden()
        blocks = self._blocks(module, trainable, passes, tuple(shares), sharpness)
        try:
            by_backward = isinstance(blocks, BackwardBlocks)
            with set_aside(trainable) if by_backward else nullcontext():
                return self._algorithm_1(
                    losses, shares, blocks, passes, aggregation, sharpness, scale
                )
        except ScaledOverflowError as overflow:
            return _to_be_skipped(losses, trainable, blocks, str(overflow))

    def means(self, passes: Passes) -> dict[str, Tensor]:
        """The losses of a batch, each the mean over the samples of all processes.

        To be asked for in all processes, of a batch whose tasks they have agreed on before.
        """
        clean = passes.clean()
        wide = {
            task: torch.promote_types(loss.dtype, torch.float32) for task, loss in clean.items()
        }
        losses = {task: loss.to(wide[task]) for task, loss in clean.items()}
        if self.processes.size == 1:
            return losses
        counts = {task: passes.count(task) for task in losses}
        return self.processes.means(losses, counts)

    def _clean_losses(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        passes: Passes,
        last: bool,
        by_task: bool,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses of this process, and its share of every task that any process has."""
        losses: dict[str, Tensor] = {}
        error = None
        try:
            losses = passes.clean()
            _check_graphs(losses)
            if not self.processes.sharded:
                self.partition.share(passes.common)
                self.partition.observe(losses)
                if self.partition.hides and by_task:
                    self._probe(module, named, losses)
        except Exception as raised:
            error = raised  # the other processes are told before it goes on
        counts = {task: passes.count(task) for task in losses}
        shares = self.processes.agree(counts, self.partition, module, named, last, error)
        if self.processes.sharded:  # then all processes have the same tasks
            self._probe(module, named, losses)
        return losses, shares

    def _probe(
        self, module: nn.Module, named: Mapping[str, nn.Parameter], losses: dict[str, Tensor]
    ) -> None:
        """Find out what new losses reach, where the graph does not show it."""
        new = {task: loss for task, loss in losses.items() if task not in self._probed}
        if new:
            trainable = [p for p in named.values() if p.requires_grad]
            observe_by_backward(self.partition, new, module, trainable)
            self._probed.update(new)

    def _algorithm_1(
        self,
        losses: dict[str, Tensor],
        shares: Mapping[str, float],
        blocks: Blocks,
        passes: Passes,
        aggregation: Aggregation,
        sharpness: Sharpness | None,
        scale: Tensor | None,
    ) -> StepResult:
        check_finite = _Finite(blocks.tasks, scaled=scale is not None)
        local = sharpness is not None and sharpness.perturbation == "local"

        # Lines 1 to 3: the gradients of every task, where the parameters are.
        stand_in = self._stand_in(shares)
        clean = task_gradients(losses, blocks, shares, scale, stand_in)
        for task, loss in losses.items():
            losses[task] = loss.detach()  # the graph goes
        ascent = Ascent(clean, blocks, local, needed=sharpness is not None)
        adaptive = sharpness is not None and sharpness.adaptive
        measures = measure(clean, ascent, losses, shares, blocks, adaptive)
        check_finite(measures.losses, "loss")
        check_finite(measures.gram.diagonal(), "gradient")
        check_finite(measures.heads, "head's gradient")

        # Lines 4 to 6: the gradients of every task at its own perturbed parameters.
        second = clean
        if sharpness is not None:
            with passes.repeating():
                second = sam_gradients(
                    clean, ascent, measures, blocks, passes, shares, sharpness, scale, stand_in
                )

        # Lines 7 to 9: aggregate the loss parts and the flat parts, each by themselves.
        second_gram = _second_gram(clean, second, check_finite, self.processes)
        weights = aggregation.loss_weights(blocks.tasks, measures.losses)
        parts = _parts(clean, second, second_gram, measures, blocks, sharpness, weights)
        direction = blocks.row("direction").zero_()
        for part, gradients in parts if blocks.shared.params else ():
            _aggregate_onto(direction, part, gradients, aggregation, blocks)

        # Line 10: hand the gradients of the shared parameters and of the heads to the optimizer.
        if self.processes.size > 1:
            losses = _means(losses, blocks.tasks, measures.losses)
        loss, untouched = _surrogate(
            losses, blocks, measures.reached, direction, second.heads, weights
        )
        return StepResult(
            loss=loss,
            losses=losses,
            gram=measures.gram,
            flat_gram=next((part.gram for part, _ in parts if part.part == "flat"), None),
            dead=measures.dead,
            untouched=untouched,
        )

    def _stand_in(self, shares: Mapping[str, float]) -> str | None:
        """A task of this process to go through layers that wait for the other processes."""
        return next((t for t, share in shares.items() if share), None) if self._waiting else None

    def _blocks(
        self,
        module: nn.Module,
        trainable: list[nn.Parameter],
        passes: Passes,
        tasks: tuple[str, ...],
        sharpness: Sharpness | None,
    ) -> Blocks:
        """The columns of the task Jacobian: the shared parameters, or the features."""
        if self.processes.sharded:
            if sharpness is not None and sharpness.perturbation == "local":
                raise ValueError(
                    "With sharded parameters no process has gradients of its own, got TaskSAM("
                    "perturbation='local'). Use 'global'."
                )
            return ShardedBlocks(
                module, trainable, self.partition, tasks, self._workspace, self.processes
            )
        if self.partition.hides:
            return BackwardBlocks(
                module, trainable, self.partition, tasks, self._workspace, self.processes
            )
        blocks = Blocks(trainable, self.partition, tasks, self._workspace, self.processes)
        if passes.features is None or not blocks.shared.params:
            return blocks
        if sharpness is not None:
            raise ValueError(
                "TaskSAM perturbs parameters and needs `gradients='parameters'`, got 'features'. "
                "Remove one of the two."
            )
        return FeatureBlocks(
            passes.features, trainable, self.partition, tasks, self._workspace, self.processes
        )


class _Finite:
    """Stops at what is NaN or infinite: an error, or, under loss scaling, a step to be skipped."""

    def __init__(self, tasks: tuple[str, ...], scaled: bool) -> None:
        self._tasks = tasks
        self._scaled = scaled

    def __call__(self, values: Tensor, what: str) -> None:
        for task, value in zip(self._tasks, values.tolist(), strict=True):
            if math.isfinite(value):
                continue
            if self._scaled:
                raise ScaledOverflowError(f"the {what} of task '{task}'")
            raise NonFiniteError(
                f"The {what} of task '{task}' must be finite, got {value}. Look at the batch and "
                "the loss of that task, or lower the learning rate (or rho, with TaskSAM)."
            )


def _second_gram(
    clean: Gradients, second: Gradients, check_finite: _Finite, processes: Processes
) -> Tensor | None:
    """Gram of the second pass, ``None`` if there was none; checked before any state moves."""
    if second is clean:
        return None
    gram, head_squares = measure_second(second, processes)
    check_finite(gram.diagonal(), "gradient at the perturbed point")
    check_finite(head_squares, "head's gradient at the perturbed point")
    return gram


def _parts(
    clean: Gradients,
    second: Gradients,
    second_gram: Tensor | None,
    measures: Measures,
    blocks: Blocks,
    sharpness: Sharpness | None,
    weights: Tensor | None,
) -> list[tuple[TaskGradients, Gradients]]:
    """The matrices to aggregate: loss part, and flat part or SAM gradients if they have moved."""

    def part(gradients: Gradients, gram: Tensor, kind: Part) -> tuple[TaskGradients, Gradients]:
        shown = TaskGradients(
            gradients.sums.shards(), gram, blocks.tasks, measures.losses, weights, kind
        )
        return shown, gradients

    loss_part = part(clean, measures.gram, "loss")
    if second_gram is None or second.shared is clean.shared:
        return [loss_part]
    if sharpness is not None and sharpness.aggregate == "direct":
        return [part(second, second_gram, "loss")]
    return [loss_part, part(second, second_gram, "flat")]


def _aggregate_onto(
    direction: Tensor,
    part: TaskGradients,
    gradients: Gradients,
    aggregation: Aggregation,
    blocks: Blocks,
) -> None:
    """Add the direction of one part to ``direction``, or this process's share of it.

    The mean of what all processes add is the direction: that is what the backward pass of
    data-parallel training makes of it.
    """
    processes, columns = blocks.processes, blocks.shared.numel
    sees = "matrix" if processes.size == 1 else aggregation.sees
    apart = processes.sharded or isinstance(blocks, FeatureBlocks)  # columns of any width
    if apart and processes.size > 1 and sees != "gram":
        raise ValueError(
            "With sharded parameters, or several processes and `gradients='features'`, an "
            f"aggregator must look at the Gram matrix only, got {aggregation!r}. Use another "
            "aggregator, or `gradients='parameters'` with strategy='ddp'."
        )
    if sees == "columns":
        kept = processes.columns(blocks.width)
        part = replace(part, columns=kept, width=columns)
        direction[kept] += aggregation.aggregate(part) * processes.size
        return
    if sees == "matrix" and processes.size > 1:
        part = replace(part, jacobian=processes.gather(part.jacobian))
    part = replace(part, jacobian=part.jacobian[:, :columns])
    weights = aggregation.row_weights(part)
    if weights is not None:
        weighted_rows(weights * processes.gain, gradients.shared, onto=direction)
    else:
        direction[:columns] += aggregation.aggregate(part)


def _to_be_skipped(
    losses: Mapping[str, Tensor], trainable: list[nn.Parameter], blocks: Blocks, overflow: str
) -> StepResult:
    """Infinite gradients: the scaler sees them, skips the step and lowers the scale."""
    params: list[Tensor] = [*trainable, *blocks.shared.params]
    gradients = [torch.full_like(p, math.inf) for p in params]
    nan = torch.full((), math.nan, device=params[0].device)
    detached = {task: losses[task].detach() if task in losses else nan for task in blocks.tasks}
    loss = surrogate_loss(torch.stack(list(detached.values())).sum(), params, gradients)
    return StepResult(loss, detached, overflow=overflow)


def _weighted_sum(
    losses: Mapping[str, Tensor],
    shares: Mapping[str, float],
    trainable: list[nn.Parameter],
    aggregation: Aggregation,
    scale: Tensor | None,
    processes: Processes,
    partition: Partition,
) -> StepResult:
    """Where the losses alone give the weights, their weighted sum is all that is needed."""
    tasks = tuple(shares)
    detached = {task: loss.detach() for task, loss in losses.items()}
    zero = torch.zeros((), dtype=torch.float64)
    mine = [share_of(detached[t].double(), shares[t]) if t in losses else zero for t in tasks]
    devices = {value.device for value in mine} - {zero.device} or {zero.device}
    values = torch.stack([value.to(next(iter(devices))) for value in mine]).cpu()
    values = processes.sum_on_host(values)
    overflow = None
    try:
        _Finite(tasks, scaled=scale is not None)(values, "loss")
    except ScaledOverflowError as error:  # the scaler sees it in the gradients
        overflow = str(error)
    weights = aggregation.loss_weights(tasks, values)
    factors = [1.0] * len(tasks) if weights is None else weights.tolist()
    total: Tensor | None = None
    for task, factor in zip(tasks, factors, strict=True):
        if task in losses:
            weight = factor * shares[task] * processes.size
            term = losses[task] if weight == 1.0 else losses[task] * weight
            total = term if total is None else total + term
    if processes.size == 1:
        assert total is not None
        return StepResult(total, detached, overflow=overflow)
    detached = _means(detached, tasks, values)
    # Data-parallel training waits for a gradient of every parameter.
    reached = reached_parameters(losses.values())
    others = [p for p in trainable if p not in reached]
    zeros = surrogate_loss(torch.zeros(()), others, [torch.zeros_like(p) for p in others])
    total = zeros if total is None else total + zeros.to(total)
    untouched = partition.untouched(trainable, tasks)
    return StepResult(total, detached, overflow=overflow, untouched=untouched)


def _means(losses: Mapping[str, Tensor], tasks: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """The losses over all processes, in the place of those of this one."""
    like = next(iter(losses.values()), values)
    return {task: like.new_tensor(v) for task, v in zip(tasks, values.tolist(), strict=True)}


def _surrogate(
    losses: Mapping[str, Tensor],
    blocks: Blocks,
    reached: list[bool],
    direction: Tensor,
    heads: Mapping[str, Tensor],
    weights: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    params, gradients = blocks.shared_gradients(direction, reached)
    processes = blocks.processes
    for i, (task, head) in enumerate(blocks.heads.items()):
        factor = processes.gain * (1.0 if weights is None else weights[i].item())
        params += head.params
        gradients += head.views(heads[task] if factor == 1.0 else heads[task] * factor)
    untouched: list[Tensor] = []
    if processes.size > 1 and not processes.sharded:
        # Data-parallel training waits for a gradient of every parameter.
        given = {p for p, g in zip(params, gradients, strict=True) if g is not None}
        untouched = [p for p in blocks.trainable if p not in given]
        params += untouched
        gradients += [torch.zeros_like(p) for p in untouched]
    total = torch.stack(list(losses.values())).sum()
    return surrogate_loss(total, params, gradients), untouched


def check_scalars(losses: Mapping[str, Tensor]) -> None:
    """Refuse what is not a scalar tensor.

    Raises:
        ValueError: If there is such a loss; the message names the task.
    """
    for task, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"The loss of task '{task}' must be a scalar tensor, got {got}. Reduce it, for "
                "example with `.mean()`."
            )


def _check_graphs(losses: Mapping[str, Tensor]) -> None:
    check_scalars(losses)
    for task, loss in losses.items():
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of task '{task}' must depend on a trainable parameter, got one without "
                "a graph. Unfreeze a parameter that it uses, or leave the task out."
            )
