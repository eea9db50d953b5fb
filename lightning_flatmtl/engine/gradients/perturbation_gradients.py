"""The gradients that the parameters are perturbed along."""

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["PerturbationGradients", "ascends_together"]


class PerturbationGradients:
    """The gradients that the parameters are perturbed along.

    Those of the tasks, whose sums over all processes are brought here; or, for a local
    perturbation, this process's share of them. With one process they are the same. For a common
    perturbation the mean of the tasks' gradients is the row of all of them.

    Args:
        clean: The clean gradients.
        blocks: The parameters.
        sharpness: The perturbation; ``None`` if there is none.
    """

    def __init__(self, clean: Gradients, blocks: Blocks, sharpness: Sharpness | None) -> None:
        processes = blocks.processes
        self.adaptive = sharpness is not None and sharpness.adaptive
        self.summed = ascends_together(blocks, sharpness)
        self.local = sharpness is not None and _apart(blocks) and sharpness.perturbation == "local"
        self._clean = clean
        self._columns = blocks.shared.numel
        self.mean: Tensor | None = None
        """The mean of the tasks' shared gradients, ``[d]``, where it is perturbed along."""
        if sharpness is not None and sharpness.perturbation in {"common", "samo"}:
            self.mean = clean.shared[:, : self._columns].mean(dim=0)
            if _apart(blocks):
                processes.sum(self.mean)
        self.heads = clean.heads
        if sharpness is not None and _apart(blocks) and not self.local:
            parts = list(clean.heads.values())
            summed = torch.split(processes.sum(torch.cat(parts)), [len(part) for part in parts])
            self.heads = dict(zip(clean.heads, summed, strict=True))

    def fetch(self, i: int) -> None:
        """Start bringing row ``i`` here."""
        if self.summed:
            self._clean.sums.fetch(i)

    def row(self, i: int) -> Tensor:
        """The row ``[d]`` of the shared block for task ``i``."""
        if self.mean is not None:
            return self.mean
        row = self._clean.sums.whole(i) if self.summed else self._clean.shared[i]
        return row[: self._columns]

    def own_squares(self, scale: Tensor | None) -> Tensor | None:
        """Squared norms ``[m]`` of the rows, where they are not those of the tasks' whole rows.

        Args:
            scale: What every entry is first multiplied by, ``[d]``; ``None`` for one.

        Returns:
            Those of what this process holds, or ``None``.
        """
        if self.mean is not None:
            return squared_norms(self.mean[None], scale).expand(len(self._clean.shared))
        if self.local:
            return squared_norms(self._clean.shared[:, : self._columns], scale)
        return None


def ascends_together(blocks: Blocks, sharpness: Sharpness | None) -> bool:
    """Whether every task's row is perturbed along as a sum over several processes."""
    return sharpness is not None and _apart(blocks) and sharpness.perturbation == "global"


def _apart(blocks: Blocks) -> bool:
    return blocks.processes.size > 1 and not blocks.processes.sharded
