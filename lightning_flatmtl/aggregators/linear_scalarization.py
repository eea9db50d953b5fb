"""The weighted sum of the losses."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._preference import Preference

__all__ = ["LinearScalarization"]


@final
class LinearScalarization(LossWeighting):
    r"""Linear scalarization (LS), also called equal weighting: the weighted sum of the losses.

    :math:`d = \sum_i w_i g_i`; each head follows :math:`w_i` times its own gradient. Without
    :class:`~lightning_flatmtl.TaskSAM` it costs one backward pass.

    Args:
        weights: A weight per task: by name, or in the order of the tasks. Each in ``[0, inf)``;
            all ones by default.

    Raises:
        ValueError: If a weight is out of its bounds, or the weights do not fit the tasks.

    Example:
        >>> import torch
        >>> LinearScalarization()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([1., 2.])
    """

    def __init__(self, weights: dict[str, float] | list[float] | None = None) -> None:
        self.weights = weights
        self._weights = Preference(weights, "weights")

    @property
    @override
    def is_plain_sum(self) -> bool:
        return True

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.weights is not None

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        return self._weights.of(tasks)
