"""Multi-objective descent with double sampling."""

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._simplex_weights import SimplexWeights
from lightning_flatmtl.engine import TaskGradients, cross_gram
from lightning_flatmtl.functional import modo_weights

__all__ = ["MoDo"]


@final
class MoDo(SimplexWeights):
    r"""Multi-objective descent with double sampling (MoDo; Chen et al., 2023).

    `arXiv:2305.20057 <https://arxiv.org/abs/2305.20057>`_: the weights take projected steps on the
    simplex along products of the gradients of two *different* batches, :math:`w \leftarrow
    \Pi_\Delta(w - \gamma\, G' G^\top w)`, because a batch's gradients multiplied with themselves
    overrate the length of noisy ones; :math:`d = \sum_i w_i g_i` is of a third batch.

    The paper draws three batches a step. Here they are the batches of three consecutive steps, at
    no further cost: :math:`G` is that of this step, :math:`G'` that of the step before, taken at
    the parameters it was trained at, and the weights that come of them are used in the step after.
    They are equal at first.

    The step of the weights is that of gradients squared: choose :math:`\gamma` for the size of
    yours, or make them comparable by ``Composition(ScaleInvariant(), MoDo())``.

    Keeps another ``[tasks, parameters]`` matrix (two with :class:`~lightning_flatmtl.TaskSAM`),
    which stands in the checkpoint. If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        gamma: Step size of the weights, in ``(0, inf)``.

    Raises:
        ValueError: If ``gamma`` is out of its bounds.

    Example:
        >>> import torch
        >>> method = MoDo(gamma=0.1)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> method(rows), method(rows)  # equal weights, until there have been two batches
        (tensor([0.5000, 1.5000]), tensor([0.5000, 1.5000]))
        >>> method(rows)
        tensor([0.7000, 0.9000])
    """

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__(gamma)

    @override
    def rows_and_weights(self, gradients: TaskGradients) -> tuple[TaskGradients, Tensor]:
        part, tasks, rows = gradients.part, gradients.tasks, gradients.jacobian
        weights = self._present(part, tasks)
        before = self._rows.known(part, tasks, rows.shape[1])
        if before:
            # A task whose first gradient this is has no part in the step of the weights.
            known = tuple(before)
            present = rows[[tasks.index(task) for task in known]]
            products = cross_gram(torch.stack(list(before.values())).to(rows.device), present)
            self._keep(part, known, modo_weights(self._present(part, known), products, self.gamma))
        self._rows.move(part, tasks, rows, 0.0)
        return gradients, weights
