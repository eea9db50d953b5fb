"""Algorithm 1 of *Improving Multi-task Learning via Seeking Task-based Flat Regions*."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.aggregation import Aggregation, SumOfLosses
from lightning_flatmtl.engine.clean_pass import CleanPass, substitute_task
from lightning_flatmtl.engine.errors import ScaledOverflowError
from lightning_flatmtl.engine.gradients.accumulation import ALONE, Accumulation, Place
from lightning_flatmtl.engine.gradients.between_steps import BetweenSteps
from lightning_flatmtl.engine.gradients.combination import refuse_infinite_weights
from lightning_flatmtl.engine.gradients.directions import (
    aggregate_onto,
    parts_of,
    shared_gradients,
    surrogate,
    to_be_skipped,
)
from lightning_flatmtl.engine.gradients.jacobian import Gradients, task_gradients
from lightning_flatmtl.engine.gradients.linear import is_linear, linear_step
from lightning_flatmtl.engine.gradients.mean_gradient import mean_gradient, needs_the_mean_only
from lightning_flatmtl.engine.gradients.nested import Nested, refuse_unfit_to_nest
from lightning_flatmtl.engine.gradients.penalty import (
    PENALTY,
    Penalty,
    gradient_of,
)
from lightning_flatmtl.engine.gradients.perturbation_gradients import (
    PerturbationGradients,
    ascends_together,
)
from lightning_flatmtl.engine.gradients.second_pass import sam_gradients
from lightning_flatmtl.engine.gradients.stats import GradientStats, measure, measure_second
from lightning_flatmtl.engine.gradients.watched import watched_gram
from lightning_flatmtl.engine.gradients.weighted_sum import means_of, weighted_sum
from lightning_flatmtl.engine.gradients.without_matrix import step_without_matrix
from lightning_flatmtl.engine.parameters.blocks import Blocks, Setting
from lightning_flatmtl.engine.parameters.choice import blocks_for
from lightning_flatmtl.engine.parameters.workspace import Workspace
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.failure import Failure
from lightning_flatmtl.engine.processes.single import SingleProcess
from lightning_flatmtl.engine.result import PerturbedLosses, StepResult
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["MultiTaskStep", "StepResult"]


class MultiTaskStep:
    r"""One training step of a multi-task model: Algorithm 1 of the flat-minima paper.

    Phan et al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_.

    For every task i the gradient :math:`g_i` of its loss, a perturbation of the shared and of the
    head parameters along it, and the gradient :math:`s_i` there. The shared parameters follow
    :math:`A(g_1, \dots, g_m) + A(s_1 - g_1, \dots, s_m - g_m)` for an aggregation :math:`A`, each
    head its own SAM gradient.

    Several batches may make one update: their gradients are accumulated, each task's as the mean
    over its samples, and lines 7 to 10 follow after the last of them, see
    :class:`~lightning_flatmtl.engine.gradients.accumulation.Accumulation`.

    The object keeps what outlives a step: the partition, the memory, what is accumulated, and the
    flat parts that are used again.

    Args:
        partition: Which parameters are shared and which belong to a head; by default it is found
            from the graphs of the losses.
        processes: The processes that share every step; by default this one alone.
        tasks: The tasks, if they are known before they come; accumulated rows are in their order.
    """

    def __init__(
        self,
        partition: Partition | None = None,
        processes: Processes | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        self.partition = Partition() if partition is None else partition
        self.processes = SingleProcess() if processes is None else processes
        self.watched = False
        """Whether the step is to measure what a diagnostic looks at and the method does not need.

        Set for single steps, in all processes alike; it changes nothing of the training.
        """
        self.between = BetweenSteps()
        """What the second passes remember; part of a checkpoint."""
        self._tasks = tuple(tasks)
        self._workspace = Workspace()
        self._clean = CleanPass(self.partition, self.processes)
        self._accumulated = Accumulation()
        self._failure = Failure(self.processes, nn.Module())

    def __call__(
        self,
        module: nn.Module,
        passes: Passes,
        aggregation: Aggregation | None = None,
        sharpness: Sharpness | None = None,
        scale: Tensor | None = None,
        last: bool = False,
        optimized: Iterable[Tensor] = (),
        place: Place = ALONE,
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
            optimized: What the optimizer trains, with what ``module`` does not know of it.
            place: The place of the batch among those that make one update.

        Returns:
            The result, or ``None`` when no process has any loss, here and in what is accumulated.

        Raises:
            ValueError: If a loss is not a scalar or reaches no trainable parameter, if the
                aggregator cannot be nested as ``sharpness`` asks for, or, with
                several processes, if the optimizer trains what the module does not know.
            NonFiniteError: If a loss or a task gradient is NaN or infinite, without loss scaling,
                or the direction is.
            ProcessError: If another process cannot go on.
        """
        aggregation = SumOfLosses() if aggregation is None else aggregation
        if sharpness is not None and not sharpness.active:
            sharpness = None
        refuse_unfit_to_nest(aggregation, sharpness)
        if place.first:
            self._accumulated = Accumulation(self._known_tasks())
            self.between.begin_update(sharpness)
        if (
            self._failure.error is None
        ):  # else that of a group that was broken off, still to be told
            self._failure = Failure(self.processes, module)
        by_task = sharpness is not None or aggregation.needs_gradients or self.processes.sharded
        by_task = by_task or place != ALONE
        by_hand = by_task or self.processes.size > 1  # else a backward pass reaches everything
        failure = self._failure
        named = self._clean.named(module, optimized if by_hand else (), failure)
        losses, term, agreed = self._clean.losses(
            module, named, passes, sharpness, last, by_task, failure
        )
        penalty = None
        if PENALTY in agreed.shares:
            penalty = Penalty(term, agreed.shares.pop(PENALTY) * self.processes.ddp_mean_correction)
        if not agreed.shares and not (place.last and self._accumulated.tasks):
            return None
        self.between.begin_batch(agreed.samples)
        setting = Setting(
            module=module,
            trainable=[p for p in named.values() if p.requires_grad],
            partition=self.partition,
            shares=agreed.shares,
            processes=self.processes,
            workspace=self._workspace,
            failure=failure,
            scale=scale,
            substitute=substitute_task(self.processes, module, agreed.shares),
            names=[name for name, p in named.items() if p.requires_grad],
        )
        try:
            if not by_task:
                result = weighted_sum(losses, setting, aggregation, penalty)
                return self._watched(result, losses, setting, passes) if self.watched else result
            self.partition.refuse_compiled()
            if place == ALONE:
                return self._update(losses, setting, passes, aggregation, sharpness, penalty)
            perturbed = None
            if agreed.shares:
                samples = agreed.samples
                perturbed = self._accumulate(losses, setting, samples, passes, sharpness, penalty)
            if not place.last:
                value = None if penalty is None else penalty.value
                return StepResult(None, losses, penalty=value, perturbed=perturbed)
            result = self._update_of_all(setting, passes, aggregation, sharpness, penalty)
            return replace(
                result,
                losses=losses,
                accumulated=result.losses,
                skipped=not agreed.shares,
                perturbed=perturbed,
            )
        except ScaledOverflowError as overflow:
            return to_be_skipped(losses, setting, passes.features, str(overflow))

    def _update(
        self,
        losses: dict[str, Tensor],
        setting: Setting,
        passes: Passes,
        aggregation: Aggregation,
        sharpness: Sharpness | None,
        penalty: Penalty | None,
    ) -> StepResult:
        """Algorithm 1 on a batch that makes an update by itself."""
        blocks = blocks_for(setting, passes, sharpness)
        with blocks.differentiating():
            of_penalty = gradient_of(penalty, blocks, self.partition)
            drawn = self.between.generator.get_state()
            linear = is_linear(aggregation, sharpness, blocks)
            mean = needs_the_mean_only(blocks, sharpness, linear=False)
            result = None
            if passes.without_matrix:
                result = step_without_matrix(losses, blocks, aggregation, of_penalty)
            elif linear and sharpness is not None:
                result = linear_step(
                    losses, blocks, passes, aggregation, sharpness, of_penalty, self.between
                )
            if result is None:
                found = lines_1_to_6(losses, blocks, passes, sharpness, self.between, mean=mean)
                result = lines_7_to_10(
                    losses,
                    blocks,
                    *found,
                    aggregation,
                    sharpness,
                    of_penalty,
                    self.between,
                    self.watched,
                )
            if self.watched and (linear or mean) and sharpness is not None:
                result = _with_grams(result, blocks, passes, sharpness, drawn)
        return result if penalty is None else _with_penalty(result, penalty)

    def _watched(
        self, result: StepResult, losses: dict[str, Tensor], setting: Setting, passes: Passes
    ) -> StepResult:
        """The result with the Gram that the step did not need, where the graphs can be kept."""
        if self.partition.hidden or not setting.shares:
            return result
        try:
            blocks = blocks_for(setting, passes, None)
            gram = watched_gram(losses, blocks, passes.without_matrix)
        finally:
            self._workspace.clear()  # the steps between have no rows
        return replace(result, gram=gram)

    def _accumulate(
        self,
        losses: dict[str, Tensor],
        setting: Setting,
        samples: Mapping[str, float],
        passes: Passes,
        sharpness: Sharpness | None,
        penalty: Penalty | None,
    ) -> PerturbedLosses | None:
        """Lines 1 to 6 on a batch that others make an update with."""
        blocks = blocks_for(setting, passes, sharpness)
        try:
            with blocks.differentiating():
                if penalty is not None:
                    of_penalty = gradient_of(penalty, blocks, self.partition)
                    self._accumulated.add_penalty(of_penalty)
                between = self.between
                clean, second, _ = lines_1_to_6(losses, blocks, passes, sharpness, between, True)
        except ScaledOverflowError as overflow:  # the scaler will skip the update
            self._accumulated.overflow = str(overflow)
            for task, loss in losses.items():
                losses[task] = loss.detach()
            return None
        moved = None if second is clean else second
        self._accumulated.add(blocks, losses, samples, clean, moved)
        return _perturbed(losses, blocks, clean, second)

    def _update_of_all(
        self,
        setting: Setting,
        passes: Passes,
        aggregation: Aggregation,
        sharpness: Sharpness | None,
        penalty: Penalty | None,
    ) -> StepResult:
        """Lines 7 to 10 on all that is accumulated."""
        found, self._accumulated = self._accumulated, Accumulation()
        if found.overflow is not None:
            raise ScaledOverflowError(found.overflow)
        setting = replace(setting, shares=dict.fromkeys(found.tasks, 1.0), substitute=None)
        blocks = blocks_for(setting, passes, sharpness)
        clean, second = found.gradients(blocks)
        if second is not None and sharpness is not None and sharpness.moves_shared:
            second = replace(second, moved=True, flat=self.between.flat)
        result = lines_7_to_10(
            found.losses,
            blocks,
            clean,
            clean if second is None else second,
            None,
            aggregation,
            sharpness,
            found.of_penalty(),
            self.between,
            self.watched,
        )
        return result if penalty is None else _with_penalty(result, penalty)

    def _known_tasks(self) -> tuple[str, ...]:
        """The tasks that have come so far, and before them those that are known to come."""
        return tuple(dict.fromkeys((*self._tasks, *self.partition.seen)))

    def means(self, batches: Iterable[Passes]) -> dict[str, Tensor]:
        """The losses of the batches of an update, each the mean over the samples of all processes.

        To be asked for in all processes, of batches whose tasks they have agreed on before. They
        come without their graphs, and without a trace in the module.
        """
        losses: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        error = None
        try:
            for passes in batches:
                with passes.repeating():
                    for task, found in passes.clean().items():
                        n = passes.count(task)
                        loss = found.detach().to(torch.promote_types(found.dtype, torch.float32))
                        counts[task] = counts.get(task, 0.0) + n
                        weight = n / counts[task] if n else 0.0
                        losses[task] = losses.get(task, loss).lerp(loss, weight)
        except Exception as raised:
            error = raised  # the other processes are told before it goes on
        return self.processes.means(losses, counts, error)


def lines_1_to_6(
    losses: dict[str, Tensor],
    blocks: Blocks,
    passes: Passes,
    sharpness: Sharpness | None,
    between: BetweenSteps,
    here: bool = False,
    mean: bool = False,
) -> tuple[Gradients, Gradients, GradientStats | None]:
    """The gradients of every task, and those at its own perturbed parameters.

    Args:
        losses: The losses that this process has; their graphs go.
        blocks: The parameters.
        passes: Computes the losses again.
        sharpness: The perturbations; ``None`` for none.
        between: What the second passes remember.
        here: Whether the rows stay in this process, to be accumulated.
        mean: Whether the mean of the clean gradients is all that is asked for.

    Returns:
        The clean gradients; those of the second pass, or the same without one; and what was
        measured of the clean ones, if anything.
    """
    # Lines 1 to 3: the gradients of every task, where the parameters are.
    measures = None
    if mean and sharpness is not None:
        clean, measures = mean_gradient(losses, blocks, sharpness.adaptive)
    else:
        clean = task_gradients(losses, blocks, here and not ascends_together(blocks, sharpness))
    for task, loss in losses.items():
        losses[task] = loss.detach()  # the graph goes
    if here and sharpness is None:
        return clean, clean, None
    ascent = PerturbationGradients(clean, blocks, sharpness)
    if measures is None:
        measures = measure(clean, ascent, losses, blocks)
        measures.check(blocks)

    # Lines 4 to 6: the gradients of every task at its own perturbed parameters.
    second = clean
    if sharpness is not None:
        second = sam_gradients(clean, ascent, measures, blocks, passes, sharpness, between, here)
    return clean, second, measures


def lines_7_to_10(
    losses: dict[str, Tensor],
    blocks: Blocks,
    clean: Gradients,
    second: Gradients,
    measures: GradientStats | None,
    aggregation: Aggregation,
    sharpness: Sharpness | None,
    of_penalty: Mapping[Tensor, Tensor],
    between: BetweenSteps,
    watched: bool = False,
) -> StepResult:
    """The direction, as a loss whose gradient it is.

    Args:
        losses: The losses, detached.
        blocks: The parameters.
        clean: The clean gradients.
        second: Those of the second pass, or the clean ones.
        measures: What is known of the clean ones; ``None`` for nothing yet.
        aggregation: The aggregator.
        sharpness: The perturbations; ``None`` for none.
        of_penalty: The gradient of what belongs to no task.
        between: What the second passes remember: flat parts that are used again.
        watched: Whether the inner products of loss parts and flat parts are wanted.
    """
    if measures is None:
        measures = measure(clean, PerturbationGradients(clean, blocks, None), losses, blocks)
        measures.check(blocks)
    second_gram = cross = None
    if second is not clean:
        wanted = sharpness is not None and (sharpness.nests or (watched and sharpness.splits))
        if between.flat is not None:
            heads = between.flat.heads(clean.heads, second.heads, measures.gram, blocks)
            second = replace(second, heads=heads)
        second_gram, cross = measure_second(
            second, blocks, clean if wanted and second.moved else None
        )
        between.end_update()

    # Lines 7 to 9: aggregate the loss parts and the flat parts, each by themselves; in two of the
    # arms, with weights that come of aggregating directions once more.
    weights = aggregation.loss_weights(blocks.tasks, measures.losses)
    refuse_infinite_weights(weights, blocks.tasks, aggregation)
    looked_at = aggregation.requires != "gram"
    parts = parts_of(clean, second, second_gram, measures, blocks, sharpness, weights, looked_at)
    if cross is not None and sharpness is not None and sharpness.nests:
        aggregation = Nested(aggregation, sharpness.aggregate, cross, parts)
    direction = blocks.row("direction")
    for i, (part, rows) in enumerate(parts if blocks.shared.params else ()):
        aggregate_onto(direction, part, rows, aggregation, blocks, empty=i == 0)

    perturbed = _perturbed(losses, blocks, clean, second)
    # Line 10: hand the gradients of the shared parameters and of the heads to the optimizer.
    if blocks.processes.size > 1:
        losses = means_of(losses, blocks.tasks, measures.losses)
    of_shared = shared_gradients(direction, measures.reached, blocks)
    loss, untouched = surrogate(losses, blocks, of_shared, second.heads, weights, of_penalty)
    return StepResult(
        loss=loss,
        losses=losses,
        gram=measures.gram if measures.crossed else None,
        flat_gram=next((part.gram for part, _ in parts if part.part == "flat"), None),
        cross_gram=cross,
        dead=measures.dead,
        untouched=untouched,
        zero=measures.zero(blocks.tasks),
        perturbed=perturbed,
    )


def _with_grams(
    result: StepResult, blocks: Blocks, passes: Passes, sharpness: Sharpness, drawn: Tensor
) -> StepResult:
    """The result with the inner products that the step did not need, all of it run once more.

    The direction stays what it is to the last bit, whether anybody looks at the step or not.
    """
    between = BetweenSteps()
    between.generator.set_state(drawn)
    with passes.repeating():
        losses = passes.again_all(blocks.tasks)
    clean, second, measures = lines_1_to_6(losses, blocks, passes, sharpness, between)
    assert measures is not None
    flat, cross = None, None
    if sharpness.splits:
        flat, cross = measure_second(second, blocks, clean)
    return replace(result, gram=measures.gram, flat_gram=flat, cross_gram=cross)


def _perturbed(
    losses: Mapping[str, Tensor], blocks: Blocks, clean: Gradients, second: Gradients
) -> PerturbedLosses | None:
    if second is clean:
        return None
    return PerturbedLosses(dict(losses), second.at_shared, second.at_heads, blocks.shares)


def _with_penalty(result: StepResult, penalty: Penalty) -> StepResult:
    if penalty.value is None:
        return result
    assert result.loss is not None
    return replace(result, loss=result.loss + penalty.value, penalty=penalty.value)
