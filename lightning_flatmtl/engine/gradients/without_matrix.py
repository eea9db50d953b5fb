"""A plain method from the Gram matrix alone: never all rows of the Jacobian at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_flatmtl.engine.aggregation import Aggregation, TaskGradients
from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.gradients.combination import (
    refuse_infinite_sum,
    refuse_infinite_weights,
    scaled,
)
from lightning_flatmtl.engine.gradients.directions import surrogate
from lightning_flatmtl.engine.gradients.gram import gram_matrix, squared_norms, wide_type
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.parameters.blocks import Blocks, unscaled
from lightning_flatmtl.engine.parameters.cuts import Piece, pieces_of
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.passes.buffers import statistics_put_back
from lightning_flatmtl.engine.result import StepResult

__all__ = ["gram_without_matrix", "refuse_unfit_for_gram", "step_without_matrix"]

Edges = Sequence[Tensor] | Sequence[GradientEdge]
Pulls = Sequence[Tensor | None]
"""The gradient of a task at each edge of a cut; ``None`` where it has none."""


@dataclass(frozen=True)
class _Found:
    """What the pieces have given.

    Args:
        gram: Inner products of the task gradients, ``[m, m]``, float64.
        heads: The gradient of every head, a vector.
        reached: The shared parameters that any loss reaches.
        kept: The gradients of every task at the cut below the heads, if all shared parameters lie
            below it; empty otherwise.
    """

    gram: Tensor
    heads: dict[str, Tensor]
    reached: set[Tensor]
    kept: list[Pulls]


def refuse_unfit_for_gram(aggregation: Aggregation) -> None:
    """Refuse an aggregator that looks at more than the Gram matrix.

    Raises:
        ValueError: If it is one.
    """
    if aggregation.requires != "gram":
        raise ValueError(
            "With `gradients='gram'` an aggregator must look at the Gram matrix only, got "
            f"{aggregation!r}. Use another aggregator, or `gradients='parameters'`."
        )


def step_without_matrix(
    losses: dict[str, Tensor],
    blocks: Blocks,
    aggregation: Aggregation,
    of_penalty: Mapping[Tensor, Tensor],
) -> StepResult | None:
    r"""The step of a method whose direction is :math:`\sum_i w_i g_i` with :math:`w(G G^\top)`.

    The graph is cut, see :func:`~lightning_flatmtl.engine.parameters.cuts.pieces_of`. Every task is
    differentiated through the first piece, then through the second, and so on; of the rows there
    are only those of the present piece, :math:`G G^\top = \sum_p G_p G_p^\top`. One more backward
    pass, of the weighted sum of the losses, is the direction.

    Args:
        losses: The losses with their graphs; the graphs go.
        blocks: The parameters, all of them in this process.
        aggregation: The aggregator.
        of_penalty: The gradient of what belongs to no task.

    Returns:
        The result; ``None`` if the graph cannot be cut so that it saves memory, and nothing has
        been differentiated.

    Raises:
        ValueError: If the aggregator looks at more than the Gram matrix.
        NonFiniteError: If a loss, a gradient or the direction is not finite.
    """
    refuse_unfit_for_gram(aggregation)
    tasks = blocks.tasks
    roots, pieces = _cut(losses, blocks)
    if not pieces:
        return None
    with statistics_put_back(blocks.module), outside_autocast(blocks.shared.device):
        found = _differentiate(roots, pieces, blocks)
        measures = _measure(found, losses, blocks)
        measures.check(blocks)
        weights = aggregation.loss_weights(tasks, measures.losses)
        refuse_infinite_weights(weights, tasks, aggregation)
        nothing = torch.empty(len(tasks), 0, dtype=blocks.shared.dtype, device=blocks.shared.device)
        shown = TaskGradients(nothing, measures.gram, tasks, measures.losses, weights)
        of_rows = aggregation.row_weights(shown)
        if of_rows is None:
            raise ValueError(
                "With `gradients='gram'` an aggregator must have `row_weights`, got "
                f"{aggregation!r}. Use another aggregator, or `gradients='parameters'`."
            )
        refuse_infinite_sum(of_rows, shown, aggregation, nothing.dtype)
        direction = _weighted(of_rows, roots, pieces, found, blocks)
    for task, loss in losses.items():
        losses[task] = loss.detach()
    of_shared = list(blocks.shared.params), direction
    loss, untouched = surrogate(losses, blocks, of_shared, found.heads, weights, of_penalty)
    return StepResult(
        loss=loss,
        losses=losses,
        gram=measures.gram,
        dead=measures.dead,
        untouched=untouched,
        zero=measures.zero(tasks),
    )


def gram_without_matrix(losses: Mapping[str, Tensor], blocks: Blocks) -> Tensor | None:
    """The Gram matrix alone, ``[m, m]``, float64; the graphs stay.

    ``None`` if the graph cannot be cut so that it saves memory.
    """
    roots, pieces = _cut(losses, blocks)
    if not pieces:
        return None
    with statistics_put_back(blocks.module), outside_autocast(blocks.shared.device):
        return _differentiate(roots, pieces, blocks).gram


def _cut(losses: Mapping[str, Tensor], blocks: Blocks) -> tuple[list[Tensor], list[Piece]]:
    roots = [blocks.root(task, losses[task]) for task in blocks.tasks]
    return roots, pieces_of(roots, blocks.shared)


def _differentiate(roots: Sequence[Tensor], pieces: Sequence[Piece], blocks: Blocks) -> _Found:
    """Every task through the first piece, then every task through the next."""
    shared = blocks.shared
    m = len(roots)
    found = _Found(
        gram=torch.zeros(m, m, dtype=torch.float64, device=shared.device),
        heads={},
        reached=set(),
        kept=[],
    )
    pulls: list[Pulls] = [(torch.ones_like(root),) for root in roots]
    entered: Edges = ()
    for k, piece in enumerate(pieces):
        for walk, group in enumerate(piece.groups):
            last = walk == len(piece.groups) - 1
            part = FlatParameters([shared.params[j] for j in group])
            rows = torch.empty(m, part.numel, dtype=shared.dtype, device=shared.device)
            for i, task in enumerate(blocks.tasks):
                top: Edges = (roots[i],) if k == 0 else entered
                head = task if k == walk == 0 else None
                below = piece.below if last else ()
                left = _row(top, pulls[i], part, head, below, rows[i], blocks, found)
                pulls[i] = left if last else pulls[i]
            found.gram.add_(gram_matrix(rows))
            del rows  # before those of the next group are made
        entered = piece.below
        if k == 0 and not any(piece.groups):
            found.kept.extend(pulls)
    return found


def _row(
    top: Edges,
    pulls: Pulls,
    part: FlatParameters,
    task: str | None,
    below: Sequence[GradientEdge],
    row: Tensor,
    blocks: Blocks,
    found: _Found,
) -> Pulls:
    """Differentiate one task in one piece.

    Args:
        top: Where the piece is entered.
        pulls: The task's gradient there.
        part: The shared parameters in question.
        task: The task whose head is in question, too; ``None`` for no head.
        below: Where the piece is left.
        row: Gets the gradients of the shared parameters.
        blocks: The parameters.
        found: Gets the head's, and what is reached.

    Returns:
        The gradients where the piece is left.
    """
    head = _NO_HEAD if task is None else blocks.heads[task]
    inputs: list[Tensor | GradientEdge] = [*part.params, *head.params, *below]
    gradients = _grad(top, pulls, inputs, retain_graph=True)
    a, b = len(part.params), len(part.params) + len(head.params)
    true = unscaled(tuple(gradients[:b]), blocks.scale)
    part.write(true[:a], row)
    found.reached.update(p for p, g in zip(part.params, true, strict=False) if g is not None)
    if task is not None:
        found.heads[task] = head.flatten(true[a:])
    return gradients[b:]


def _grad(
    edges: Edges,
    pulls: Pulls,
    inputs: Sequence[Tensor | GradientEdge],
    retain_graph: bool = False,
) -> Pulls:
    """The gradients of what has ``pulls`` at ``edges``, ``None`` where it does not reach."""
    there = [(edge, pull) for edge, pull in zip(edges, pulls, strict=True) if pull is not None]
    if not there or not inputs:
        return [None] * len(inputs)
    outputs: Any = [edge for edge, _ in there]
    found: Pulls = torch.autograd.grad(
        outputs,
        inputs,  # type: ignore[arg-type]
        [pull for _, pull in there],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return found


def _measure(found: _Found, losses: Mapping[str, Tensor], blocks: Blocks) -> GradientStats:
    """Gram, losses and norms, fetched in one transfer."""
    m, gram = len(blocks.tasks), found.gram
    values = torch.stack([losses[task].detach().to(gram) for task in blocks.tasks])
    heads = torch.cat([squared_norms(found.heads[task][None]) for task in blocks.tasks])
    host = torch.cat([gram.flatten(), values, heads.to(gram)]).cpu()
    gram, values, heads = torch.split(host, [m * m, m, m])
    gram = gram.view(m, m)
    squares = gram.diagonal().tolist()
    reached = [p in found.reached for p in blocks.shared.params]
    return GradientStats(gram, values, heads, reached, squares, heads.tolist())


def _weighted(
    weights: Tensor, roots: Sequence[Tensor], pieces: Sequence[Piece], found: _Found, blocks: Blocks
) -> list[Tensor | None]:
    """The gradient of each shared parameter of the weighted sum of the losses; the graph goes."""
    shared = blocks.shared
    if found.kept:
        edges: Edges = pieces[0].below
        begin, factor = _sums(weights.tolist(), found.kept)
    else:
        edges = roots
        factor = float(weights.abs().sum()) or 1.0
        begin = [
            torch.full_like(root, w / factor) if w else None
            for root, w in zip(roots, weights.tolist(), strict=True)
        ]
    params = [p for p in shared.params if p in found.reached]
    gradients = _grad(edges, begin, params)
    left = list(reversed(gradients))
    del gradients  # one by one, or there would be two directions in memory
    direction: list[Tensor | None] = []
    for p in shared.params:
        reached = p in found.reached
        (g,) = unscaled((left.pop(),), blocks.scale) if reached else (None,)
        if g is not None:
            direction.append(scaled(g.to(shared.dtype), factor))
        else:
            direction.append(torch.zeros_like(p) if reached else None)
    return direction


@torch.no_grad()
def _sums(weights: Sequence[float], kept: Sequence[Pulls]) -> tuple[list[Tensor | None], float]:
    """The weighted sum over the tasks at every edge of a cut, divided by a common factor.

    They are added in float64, since terms may nearly cancel. With the factor they are as large as
    the largest term is without its weight: in 16 bits nothing overflows then that has not before.

    Args:
        weights: The weights.
        kept: The gradients of each task at the edges.
    """
    sums: list[Tensor | None] = []
    types: list[torch.dtype] = []
    longest: list[Tensor] = []
    for of_tasks in zip(*kept, strict=True):
        terms = [(w, g) for w, g in zip(weights, of_tasks, strict=True) if w and g is not None]
        total: Tensor | None = None
        for weight, term in terms:
            wide = term.to(wide_type(term.device))
            total = wide * weight if total is None else total.add_(wide, alpha=weight)
            longest.append(wide.abs().max())
        sums.append(total)
        types.append(terms[0][1].dtype if terms else torch.float32)
    peaks = [total.abs().max() for total in sums if total is not None]
    if not peaks:
        return sums, 1.0
    peak, bound = torch.stack([torch.stack(peaks).max(), torch.stack(longest).max()]).tolist()
    factor = peak / bound if peak else 1.0
    pairs = zip(sums, types, strict=True)
    return [None if g is None else (g / factor).to(dtype) for g, dtype in pairs], factor


_NO_HEAD = FlatParameters([])
