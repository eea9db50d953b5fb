"""SAMO's perturbation: the mean gradient, mixed with an estimate of the task's own direction."""

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.gradients.perturbed import Perturbed
from lightning_flatmtl.engine.parameters.blocks import Blocks, share_of
from lightning_flatmtl.engine.passes.base import Passes

__all__ = ["SamoDirections"]


class SamoDirections:
    r"""What SAMO perturbs the shared parameters along.

    Ban, Subramani, Ji, `arXiv:2507.07883 <https://arxiv.org/abs/2507.07883>`_. For every parameter
    tensor by itself, with the mean gradient :math:`\bar g` and a normal vector z,

    .. math:: (1 - \beta)\, \bar g + \beta\, \lVert \bar g \rVert\,
        \hat g_i / \lVert \hat g_i \rVert,
        \qquad \hat g_i = \frac{L_i(\theta + \mu z) - L_i(\theta - \mu z)}{2 \mu}\, z

    Of the estimate only the sign of the difference is left by the division. Where the losses are
    equal, or a tensor has no entry but zeros, the estimate counts as zero.

    Each task has a vector of its own: it is drawn on the CPU, twice, from a seed that is the same
    in all processes, so that none has to be kept. The losses are means over the samples of all of
    them.

    Args:
        mean: :math:`\bar g`, ``[d]``.
        turn: The tasks to be perturbed, by their place.
        blocks: The parameters.
        generator: Gives the seeds; the same in all processes.
    """

    def __init__(
        self, mean: Tensor, turn: tuple[int, ...], blocks: Blocks, generator: torch.Generator
    ) -> None:
        self._mean, self._blocks, self._turn = mean, blocks, turn
        seeds = torch.randint(2**62, (len(blocks.tasks),), generator=generator)
        self._seeds: list[int] = seeds.tolist()
        self._rises = torch.zeros(len(blocks.tasks), dtype=torch.float64)
        self._signs: list[float] | None = None

    @torch.no_grad()
    def probe(self, perturbed: Perturbed, passes: Passes) -> None:
        """Find out whether the losses of this process rise along the vectors.

        The model runs as in every second pass: in training mode, with the dropout masks of the
        clean pass. (The published code runs it in evaluation mode here.)

        Args:
            perturbed: Moves the parameters.
            passes: Computes the losses.
        """
        blocks, step = self._blocks, perturbed.sharpness.samo_step
        for i in self._turn:
            task = blocks.tasks[i]
            source = blocks.source(task)
            if source is None:
                continue
            z = self._vector(i)
            for sign in (1.0, -1.0):
                with perturbed.shared_by(z, sign * step):
                    loss = share_of(passes.again(source).detach().double(), blocks.shares[task])
                self._rises[i] += sign * loss.cpu()

    def agree(self) -> None:
        """Bring the processes together on it, once; to be called in all of them."""
        if self._signs is None:
            rises = self._blocks.processes.sum_on_host(self._rises)
            self._signs = torch.where(rises.isfinite(), rises.sign(), 0.0).tolist()

    @torch.no_grad()
    def along(self, i: int, perturbed: Perturbed) -> tuple[Tensor, float]:
        """What task ``i`` is perturbed along, ``[d]``, and its squared norm.

        The norm is weighted by the parameters if the perturbation is adaptive.
        """
        assert self._signs is not None
        shared, beta = self._blocks.shared, perturbed.sharpness.samo_beta
        mixed, z = self._mean * (1 - beta), self._vector(i)
        for view, mean, own in zip(*map(shared.views, (mixed, self._mean, z)), strict=True):
            share = beta * self._signs[i] * mean.norm() / own.norm()
            view.add_(torch.where(own.any(), own * share, 0.0))
        scale = perturbed.values if perturbed.sharpness.adaptive else None
        return mixed, float(squared_norms(mixed[None], scale))

    def _vector(self, i: int) -> Tensor:
        shared = self._blocks.shared
        drawn = torch.Generator().manual_seed(self._seeds[i])
        return torch.randn(shared.numel, generator=drawn, dtype=shared.dtype).to(shared.device)
