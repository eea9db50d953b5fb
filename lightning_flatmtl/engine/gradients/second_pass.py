"""The second pass: every task's gradients at its own perturbed parameters."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace

from lightning_flatmtl.engine.gradients.between_steps import BetweenSteps
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.gradients.perturbed import Perturbed
from lightning_flatmtl.engine.gradients.samo import SamoDirections
from lightning_flatmtl.engine.gradients.second_rows import RowSink, SecondRows
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["sam_gradients"]


def sam_gradients(
    clean: Gradients,
    ascent: PerturbationGradients,
    measures: GradientStats,
    blocks: Blocks,
    passes: Passes,
    sharpness: Sharpness,
    between: BetweenSteps,
    here: bool = False,
    sink: RowSink | None = None,
) -> Gradients:
    """SAM gradients of all tasks; those of the shared block less the clean ones if split.

    Args:
        clean: The clean gradients; they are left as they are.
        ascent: What to perturb along.
        measures: Its norms.
        blocks: The parameters.
        passes: Computes the losses again.
        sharpness: Radii and point.
        between: Keeps the flat parts, if they are kept, and says which tasks renew theirs; gives
            the random numbers.
        here: Whether the rows stay in this process for now.
        sink: Takes the rows as they come, if neither flat parts nor all rows are kept.

    Returns:
        New gradients; for a part that does not move, the clean ones. With several processes an
        error is kept for the next sum, and they mean nothing.
    """
    sink = between.flat if sink is None else sink
    second = SecondRows(clean, ascent, blocks, sharpness, here, sink)
    joint = sharpness.point == "joint"
    if not second.turn:  # the module need not be guarded for nothing
        found = second.gradients()
        return replace(found, flat=between.flat) if found.moved else found
    samo = None
    if sharpness.perturbation == "samo" and second.exchanges:
        assert ascent.mean is not None
        samo = SamoDirections(ascent.mean, second.turn, blocks, between.generator)
    with blocks.failure.kept(), passes.repeating():
        perturbed = Perturbed(ascent, measures, blocks, sharpness)
        # The heads come first, while what the clean pass has left behind is still there.
        if not joint and sharpness.moves_heads:
            _heads(second, perturbed, blocks, passes)
        if samo is not None:
            samo.probe(perturbed, passes)
            samo.agree()
        if second.exchanges and sharpness.perturbation == "common":
            summed = sink is not None and sink.sums_with is not None
            _all_at_once(second, perturbed, blocks, passes, joint, summed)
        elif second.exchanges:
            _one_by_one(second, perturbed, blocks, passes, joint, samo)
    if samo is not None:
        samo.agree()  # a process that has failed takes part, too
    second.complete()
    found = second.gradients()
    return replace(found, flat=between.flat) if found.moved else found


def _heads(second: SecondRows, perturbed: Perturbed, blocks: Blocks, passes: Passes) -> None:
    """The gradient of every head where it alone is perturbed."""
    for i in second.turn:
        task = blocks.tasks[i]
        source, head = blocks.source(task), blocks.heads[task]
        if head.params and source is not None:
            with perturbed.head(i):
                again = passes.head_again(source, head.params)
                if source == task:
                    (of_head,) = blocks.differentiate(task, again, [head])
                    second.heads[task] = head.flatten(of_head)
                    second.at_heads[task] = again.detach()


def _one_by_one(
    second: SecondRows,
    perturbed: Perturbed,
    blocks: Blocks,
    passes: Passes,
    joint: bool,
    samo: SamoDirections | None,
) -> None:
    """Every task at a point of its own, each with a forward pass."""
    for i in second.turn:
        source = blocks.source(blocks.tasks[i])
        row, squared = second.row(i), None
        if samo is not None:
            row, squared = samo.along(i, perturbed)
        with perturbed.shared(i, row, squared), perturbed.head(i) if joint else nullcontext():
            if source is not None:
                second.take(i, passes.again(source), joint)
        second.send(i, source is not None)


def _all_at_once(
    second: SecondRows,
    perturbed: Perturbed,
    blocks: Blocks,
    passes: Passes,
    joint: bool,
    summed: bool,
) -> None:
    """All tasks at the one point that they share: a single forward pass.

    And a single backward pass, where the weighted sum of their gradients will do.
    """
    sources = {i: blocks.source(blocks.tasks[i]) for i in second.turn}
    here = [i for i, source in sources.items() if source is not None]
    with ExitStack() as at:
        rows = [second.row(i) for i in second.turn]
        if rows:
            at.enter_context(perturbed.shared(second.turn[0], rows[0]))
        for i in second.turn if joint else ():
            at.enter_context(perturbed.head(i))
        losses = passes.again_all([s for s in dict.fromkeys(sources.values()) if s is not None])
        if summed:
            second.take_sum(losses, joint)
            return
        for i, source in sources.items():
            if source is not None:
                second.take(i, losses[source], joint, retain_graph=i != here[-1])
            second.send(i, source is not None)
