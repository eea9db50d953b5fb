"""Inner products and norms of task gradients: all that the host learns of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatmtl.engine.checks import Finite
from lightning_flatmtl.engine.gradients.gram import gram_matrix, squared_norms
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.parameters.blocks import Blocks, share_of

__all__ = ["GradientStats", "measure", "measure_second"]


@dataclass(frozen=True)
class GradientStats:
    """What the host needs to know of the clean gradients, fetched in one transfer.

    All but the squares of a local perturbation are the same in all processes.

    Args:
        gram: Inner products of the shared rows, ``[m, m]``, float64 on the CPU.
        losses: The losses ``[m]``, float64 on the CPU.
        heads: Squared norms of the heads' gradients (or the sums of those of their shares): finite
            and positive if and only if the gradients are finite and not zero.
        reached: For each shared parameter whether any loss of any process reaches it.
        shared_squares: Squared norms of the rows to ascend along, weighted by the parameters if
            adaptive.
        head_squares: The same for the heads.
        crossed: Whether inner products of different tasks are known; if not, ``gram`` is diagonal.
    """

    gram: Tensor
    losses: Tensor
    heads: Tensor
    reached: list[bool]
    shared_squares: list[float]
    head_squares: list[float]
    crossed: bool = True

    def zero(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks whose loss and gradients are exactly zero."""
        numbers = zip(self.losses.tolist(), self.gram.diagonal().tolist(), strict=True)
        heads = self.heads.tolist()
        each = zip(tasks, numbers, heads, strict=True)
        return tuple(task for task, pair, head in each if not (any(pair) or head))

    def check(self, blocks: Blocks) -> None:
        """Stop at what is not finite; see :class:`~lightning_flatmtl.engine.checks.Finite`."""
        check_finite = Finite(blocks.tasks, blocks.scaled)
        check_finite(self.losses, "loss")
        check_finite(self.gram.diagonal(), "gradient")
        check_finite(self.heads, "head's gradient")

    @property
    def dead(self) -> bool:
        """Whether every task gradient is exactly zero."""
        return not (self.gram.diagonal() if self.reached else self.heads).any()


@torch.no_grad()
def measure(
    gradients: Gradients,
    ascent: PerturbationGradients,
    losses: Mapping[str, Tensor],
    blocks: Blocks,
    crossed: bool = True,
) -> GradientStats:
    """Gram, losses and norms of the clean gradients.

    Args:
        gradients: The clean gradients.
        ascent: What the parameters are perturbed along.
        losses: The clean losses that this process has.
        blocks: The parameters.
        crossed: Whether inner products of different tasks are asked for.

    Raises:
        ProcessError: If another process has failed since the losses were agreed on.
    """
    adaptive = ascent.adaptive
    m, processes, shared = len(blocks.tasks), blocks.processes, blocks.shared
    scale = shared.save(blocks.vector("saved")) if adaptive else None
    shards = gradients.sums.shards()
    gram = gram_matrix(shards) if crossed else torch.diag(squared_norms(shards))
    zero = torch.zeros((), dtype=torch.float64, device=gram.device)
    values = [
        share_of(losses[t].detach().to(gram), share) if share else zero
        for t, share in blocks.shares.items()
    ]
    heads = _head_squares(ascent, blocks, adaptive=False)
    reached = torch.tensor(gradients.reached, dtype=torch.float64)
    parts = {"gram": gram.flatten(), "losses": torch.stack(values), "heads": heads}
    if processes.size > 1:
        if not blocks.of_samples:
            parts["reached"] = reached
        parts["failed"] = gram.new_full((1,), blocks.failure.flag)
    squares = ascent.own_squares(scale)
    if squares is not None and processes.sharded:
        parts["shared squares"] = squares
    elif squares is None and adaptive:
        kept = None if scale is None else blocks.kept_columns(scale)
        parts["shared squares"] = squared_norms(shards, kept)
    if adaptive and processes.sharded:
        parts["head squares"] = _head_squares(ascent, blocks, adaptive)
    summed = processes.sum(torch.cat([part.to(gram.device) for part in parts.values()]))
    # What is the same in all processes, or is this one's own, is not summed.
    own = {}
    if squares is not None and not processes.sharded:
        own["shared squares"] = squares
    if not processes.sharded and (adaptive or processes.size > 1):
        own["head squares"] = _head_squares(ascent, blocks, adaptive)
    host = torch.cat([summed, *(part.to(gram.device) for part in own.values())]).cpu()
    names = [*parts, *own]
    pieces = torch.split(host, [len(part) for part in (*parts.values(), *own.values())])
    found = dict(zip(names, pieces, strict=True))
    if processes.size > 1:
        blocks.failure.tell(float(found["failed"]))
    gram = found["gram"].view(m, m)
    return GradientStats(
        gram=gram,
        losses=found["losses"],
        heads=found["heads"],
        reached=[n > 0 for n in found.get("reached", reached).tolist()],
        shared_squares=found.get("shared squares", gram.diagonal()).tolist(),
        head_squares=found.get("head squares", found["heads"]).tolist(),
        crossed=crossed,
    )


@torch.no_grad()
def measure_second(
    gradients: Gradients, blocks: Blocks, clean: Gradients | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gram of the second pass ``[m, m]``, float64 on the CPU, the same in all processes.

    It comes in one transfer with the squared norms of the head gradients; nothing of both may be
    NaN or infinite.

    Args:
        gradients: Those of the second pass.
        blocks: The parameters.
        clean: The clean ones, if their inner products (rows) with the second (columns) are wanted.

    Returns:
        The Gram, and the inner products with ``clean``; ``None`` without it.

    Raises:
        ProcessError: If another process has failed in the second pass.
    """
    gram = gradients.products(blocks)
    cross = gram.new_zeros(0) if clean is None else gradients.cross(clean, blocks)
    heads = torch.cat([squared_norms(head[None]) for head in gradients.heads.values()])
    # With several processes the sums of squares of shares: enough to see what is not finite.
    flag = gram.new_full((1,), blocks.failure.flag)
    parts = [gram.flatten(), cross.flatten(), heads.to(gram.device), flag]
    host = blocks.processes.sum(torch.cat(parts)).cpu()
    found, of_both, head_squares, flags = torch.split(host, [len(part) for part in parts])
    blocks.failure.tell(float(flags))
    found = gradients.gram(found.view(gram.shape), blocks)
    check_finite = Finite(blocks.tasks, blocks.scaled)
    check_finite(found.diagonal(), "gradient at the perturbed point")
    check_finite(head_squares, "head's gradient at the perturbed point")
    m = len(blocks.tasks)
    return found, None if clean is None else gradients.scaled_cross(of_both.view(m, m))


def _head_squares(ascent: PerturbationGradients, blocks: Blocks, adaptive: bool) -> Tensor:
    pairs = [(ascent.heads[task], head) for task, head in blocks.heads.items()]
    return torch.cat(
        [squared_norms(g[None], head.values() if adaptive else None) for g, head in pairs]
    )
