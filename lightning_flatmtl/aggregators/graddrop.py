"""Keeping one sign of the gradient in every coordinate."""

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._random import RandomAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.aggregation import Requires
from lightning_flatmtl.functional import graddrop_direction

__all__ = ["GradDrop"]


@final
class GradDrop(RandomAggregator):
    r"""Gradient sign dropout (Chen et al., 2020).

    `arXiv:2010.06808 <https://arxiv.org/abs/2010.06808>`_: in every coordinate, with the purity
    :math:`P = \tfrac12 (1 + \sum_i g_i / \sum_i \lvert g_i \rvert)` and :math:`u \sim U[0, 1)`, the
    positive entries are kept if :math:`u < P`, else the negative ones, and the kept ones summed:
    Algorithm 1, lines 10 to 15, on parameters. The numbers are drawn on the device of the gradients
    from a seed drawn on the CPU, so that all ranks agree.

    If all :math:`g_i = g`, the direction is :math:`m\,g`. ``leak=1`` is the plain sum.

    Args:
        leak: Share of each gradient that passes whatever the draw, in ``[0, 1]``.
        seed: Seed of the private generator, ``seed >= 0``.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> GradDrop()(torch.tensor([[1.0, -1.0, 2.0], [3.0, -1.0, 0.0]]))
        tensor([ 4., -2.,  2.])
    """

    def __init__(self, leak: float = 0.0, seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= leak <= 1:
            raise ValueError(f"`leak` must be in [0, 1], got {leak}.")
        self.leak = leak

    @property
    @override
    def requires(self) -> Requires:
        return "columns"

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return graddrop_direction(gradients.jacobian, self._draw(gradients), self.leak)

    def _draw(self, gradients: TaskGradients) -> Tensor:
        rows, kept = gradients.jacobian, gradients.columns
        seed = int(torch.randint(2**62, (), generator=self._generator))
        generator = torch.Generator(device=rows.device).manual_seed(seed)
        count = rows.shape[1] if kept is None else gradients.width
        wide = torch.promote_types(rows.dtype, torch.float32)
        drawn = torch.rand(count, generator=generator, device=rows.device, dtype=wide)
        if kept is None:
            return drawn
        # Columns beyond the width fill up the last process's share; their rows are zero.
        return torch.nn.functional.pad(drawn, (0, max(0, kept.stop - count)))[kept]
