"""Algorithm 1 of *Improving Multi-task Learning via Seeking Task-based Flat Regions*."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
    Blocks,
    Gradients,
    Measures,
    measure,
    measure_second,
    task_gradients,
)
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.passes import Passes
from lightning_flatmtl.engine.perturbation import sam_gradients
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
    """

    loss: Tensor
    losses: dict[str, Tensor]
    gram: Tensor | None = None
    flat_gram: Tensor | None = None
    dead: bool = False
    overflow: str | None = None

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
    """

    def __init__(self, partition: Partition | None = None) -> None:
        self.partition = Partition() if partition is None else partition
        self._workspace = Workspace()

    def __call__(
        self,
        module: nn.Module,
        passes: Passes,
        aggregation: Aggregation | None = None,
        sharpness: Sharpness | None = None,
        scale: Tensor | None = None,
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

        Returns:
            The result, or ``None`` when the batch has no loss at all.

        Raises:
            ValueError: If a loss is not a scalar or reaches no trainable parameter.
            NonFiniteError: If a loss or a task gradient is NaN or infinite, without loss scaling.
        """
        aggregation = SumOfLosses() if aggregation is None else aggregation
        if sharpness is not None and not sharpness.active:
            sharpness = None
        if sharpness is not None:
            passes.keep_start()
            if sharpness.point == "separate" and sharpness.moves_heads:
                params = [p for p in module.parameters() if p.requires_grad]
                passes.expect_heads([self.partition.head(t, params) for t in self.partition.seen])
        losses = passes.clean()
        if not losses:
            return None
        _check_graphs(losses)
        self.partition.share(passes.common)
        self.partition.observe(losses)
        if sharpness is None and not aggregation.needs_gradients:
            return _weighted_sum(losses, aggregation, scale)
        self.partition.refuse_hidden()
        trainable = [p for p in module.parameters() if p.requires_grad]
        blocks = self._blocks(trainable, passes, tuple(losses), sharpness)
        try:
            return self._algorithm_1(losses, blocks, passes, aggregation, sharpness, scale)
        except ScaledOverflowError as overflow:
            return _to_be_skipped(losses, blocks, str(overflow))

    def _algorithm_1(
        self,
        losses: dict[str, Tensor],
        blocks: Blocks,
        passes: Passes,
        aggregation: Aggregation,
        sharpness: Sharpness | None,
        scale: Tensor | None,
    ) -> StepResult:
        check_finite = _Finite(blocks.tasks, scaled=scale is not None)

        # Lines 1 to 3: the gradients of every task, where the parameters are.
        clean = task_gradients(losses, blocks, scale)
        for task, loss in losses.items():
            losses[task] = loss.detach()  # the graph goes
        measures = measure(clean, losses, blocks, sharpness is not None and sharpness.adaptive)
        check_finite(measures.losses, "loss")
        check_finite(measures.gram.diagonal(), "gradient")
        check_finite(torch.tensor(measures.head_squares), "head's gradient")

        # Lines 4 to 6: the gradients of every task at its own perturbed parameters.
        second = clean
        if sharpness is not None:
            with passes.repeating():
                second = sam_gradients(clean, measures, blocks, passes, sharpness, scale)

        # Lines 7 to 9: aggregate the loss parts and the flat parts, each by themselves.
        second_gram = _second_gram(clean, second, check_finite)
        weights = aggregation.loss_weights(blocks.tasks, measures.losses)
        parts = _parts(clean, second, second_gram, measures, blocks, sharpness, weights)
        direction = blocks.vector("direction").zero_()
        for part in parts if blocks.shared.params else ():
            _aggregate_onto(direction, part, aggregation)

        # Line 10: hand the gradients of the shared parameters and of the heads to the optimizer.
        return StepResult(
            loss=_surrogate(losses, blocks, clean.reached, direction, second.heads, weights),
            losses=losses,
            gram=measures.gram,
            flat_gram=next((part.gram for part in parts if part.part == "flat"), None),
            dead=measures.dead,
        )

    def _blocks(
        self,
        trainable: list[nn.Parameter],
        passes: Passes,
        tasks: tuple[str, ...],
        sharpness: Sharpness | None,
    ) -> Blocks:
        """The columns of the task Jacobian: the shared parameters, or the features."""
        blocks = Blocks(trainable, self.partition, tasks, self._workspace)
        if passes.features is None or not blocks.shared.params:
            return blocks
        if sharpness is not None:
            raise ValueError(
                "TaskSAM perturbs parameters and needs `gradients='parameters'`, got 'features'. "
                "Remove one of the two."
            )
        return FeatureBlocks(passes.features, trainable, self.partition, tasks, self._workspace)


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


def _second_gram(clean: Gradients, second: Gradients, check_finite: _Finite) -> Tensor | None:
    """Gram of the second pass, ``None`` if there was none; checked before any state moves."""
    if second is clean:
        return None
    gram, head_squares = measure_second(second)
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
) -> list[TaskGradients]:
    """The matrices to aggregate: loss part, and flat part or SAM gradients if they have moved."""

    def task_gradients(rows: Tensor, gram: Tensor, part: Part) -> TaskGradients:
        return TaskGradients(rows, gram, blocks.tasks, measures.losses, weights, part)

    loss_part = task_gradients(clean.shared, measures.gram, "loss")
    if second_gram is None or second.shared is clean.shared:
        return [loss_part]
    if sharpness is not None and sharpness.aggregate == "direct":
        return [task_gradients(second.shared, second_gram, "loss")]
    return [loss_part, task_gradients(second.shared, second_gram, "flat")]


def _aggregate_onto(direction: Tensor, part: TaskGradients, aggregation: Aggregation) -> None:
    weights = aggregation.row_weights(part)
    if weights is not None:
        weighted_rows(weights, part.jacobian, onto=direction)
    else:
        direction += aggregation.aggregate(part)


def _to_be_skipped(losses: Mapping[str, Tensor], blocks: Blocks, overflow: str) -> StepResult:
    """Infinite gradients: the scaler sees them, skips the step and lowers the scale."""
    params = [*blocks.shared.params, *(p for head in blocks.heads.values() for p in head.params)]
    gradients = [torch.full_like(p, math.inf) for p in params]
    detached = {task: loss.detach() for task, loss in losses.items()}
    loss = surrogate_loss(torch.stack(list(detached.values())).sum(), params, gradients)
    return StepResult(loss, detached, overflow=overflow)


def _weighted_sum(
    losses: Mapping[str, Tensor], aggregation: Aggregation, scale: Tensor | None
) -> StepResult:
    """Where the losses alone give the weights, their weighted sum is all that is needed."""
    detached = {task: loss.detach() for task, loss in losses.items()}
    values = torch.stack([loss.to(torch.float64) for loss in detached.values()]).cpu()
    tasks = tuple(losses)
    if scale is None:  # the scaler looks at the gradients
        _Finite(tasks, scaled=False)(values, "loss")
    weights = aggregation.loss_weights(tasks, values)
    terms = list(losses.values())
    if weights is not None:
        terms = [w * loss for w, loss in zip(weights.tolist(), terms, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return StepResult(total, detached)


def _surrogate(
    losses: Mapping[str, Tensor],
    blocks: Blocks,
    reached: list[bool],
    direction: Tensor,
    heads: Mapping[str, Tensor],
    weights: Tensor | None,
) -> Tensor:
    params, gradients = blocks.shared_gradients(direction, reached)
    for i, (task, head) in enumerate(blocks.heads.items()):
        of_head = heads[task] if weights is None else heads[task] * weights[i].item()
        params += head.params
        gradients += head.views(of_head)
    total = torch.stack(list(losses.values())).sum()
    return surrogate_loss(total, params, gradients)


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
