"""The gradients that the parameters are perturbed along."""

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["PerturbationGradients", "ascends_together"]


class PerturbationGradients:
    """The gradients that the parameters are perturbed along.

    Those of the tasks, whose sums over all processes are brought here; or, for a local
    perturbation, this process's share of them. With one process they are the same.

    Args:
        clean: The clean gradients.
        blocks: The parameters.
        sharpness: The perturbation; ``None`` if there is none.
    """

    def __init__(self, clean: Gradients, blocks: Blocks, sharpness: Sharpness | None) -> None:
        processes = blocks.processes
        self.adaptive = sharpness is not None and sharpness.adaptive
        self.summed = ascends_together(blocks, sharpness)
        self.local = sharpness is not None and _apart(blocks) and not self.summed
        self._clean = clean
        self._columns = blocks.shared.numel
        self.heads = clean.heads
        if self.summed:
            parts = list(clean.heads.values())
            summed = torch.split(processes.sum(torch.cat(parts)), [len(part) for part in parts])
            self.heads = dict(zip(clean.heads, summed, strict=True))

    def fetch(self, i: int) -> None:
        """Start bringing row ``i`` here."""
        if self.summed and i < len(self._clean.shared):
            self._clean.sums.fetch(i)

    def row(self, i: int) -> Tensor:
        """The row ``[d]`` of the shared block for task ``i``."""
        row = self._clean.sums.whole(i) if self.summed else self._clean.shared[i]
        return row[: self._columns]


def ascends_together(blocks: Blocks, sharpness: Sharpness | None) -> bool:
    """Whether the perturbation is along sums over several processes."""
    return sharpness is not None and _apart(blocks) and sharpness.perturbation == "global"


def _apart(blocks: Blocks) -> bool:
    return blocks.processes.size > 1 and not blocks.processes.sharded
