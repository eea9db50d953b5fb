"""Multi-objective gradient correction: moving averages of the gradients."""

import math
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._simplex_weights import SimplexWeights
from lightning_flatmtl.engine import TaskGradients, gram_matrix
from lightning_flatmtl.functional import moco_weights

__all__ = ["MoCo"]


@final
class MoCo(SimplexWeights):
    r"""Multi-objective gradient correction (MoCo; Fernando et al., 2023).

    `arXiv:2210.12624 <https://arxiv.org/abs/2210.12624>`_: of every task gradient a moving average
    :math:`y_i \leftarrow y_i - \beta\,(y_i - g_i)` is kept, :math:`d = \sum_i w_i y_i`, and the
    weights then take a projected step on the simplex towards the shortest vector of the
    :math:`y_i`, :math:`w \leftarrow \Pi_\Delta(w - \gamma (K_y + \rho I) w)`. So the noise of a
    mini-batch biases the weights less than those of :class:`MGDA`. An average begins with the first
    gradient of its task, the weights are equal at first; step sizes do not decay.

    The step of the weights is that of gradients squared: choose :math:`\gamma` for the size of
    yours, or make them comparable by ``Composition(ScaleInvariant(), MoCo())``.

    Keeps another ``[tasks, parameters]`` matrix (two with :class:`~lightning_flatmtl.TaskSAM`),
    which stands in the checkpoint. If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        beta: Share of the new gradient in the average, in ``(0, 1]``; 1 keeps none.
        gamma: Step size of the weights, in ``(0, inf)``.
        rho: Pull towards equal weights, in ``[0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> method = MoCo(beta=0.5, gamma=0.25)
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # equal weights, then one step
        tensor([0.5000, 1.5000])
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # all weight on the first
        tensor([1., 0.])
    """

    def __init__(self, beta: float = 0.1, gamma: float = 0.1, rho: float = 0.0) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"`beta` must be in (0, 1], got {beta}.")
        if not 0 <= rho < math.inf:
            raise ValueError(f"`rho` must be in [0, inf), got {rho}.")
        super().__init__(gamma)
        self.beta = beta
        self.rho = rho

    @override
    def rows_and_weights(self, gradients: TaskGradients) -> tuple[TaskGradients, Tensor]:
        part, tasks = gradients.part, gradients.tasks
        averages = torch.stack(self._rows.move(part, tasks, gradients.jacobian, 1 - self.beta))
        gram = gram_matrix(averages).cpu()
        weights = self._present(part, tasks)
        self._keep(part, tasks, moco_weights(weights, gram, self.gamma, self.rho))
        return replace(gradients, jacobian=averages, gram=gram), weights
