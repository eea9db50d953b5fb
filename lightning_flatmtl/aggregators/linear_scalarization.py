"""The weighted sum of the losses."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting

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
        for weight in (weights.values() if isinstance(weights, Mapping) else weights) or ():
            if not 0 <= weight < torch.inf:
                raise ValueError(f"`weights` must be in [0, inf), got {weight}.")
        self.weights = weights

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        if self.weights is None:
            return None
        if isinstance(self.weights, Mapping):
            missing = [task for task in tasks if task not in self.weights]
            if missing:
                raise ValueError(
                    f"`weights` must have an entry for every task, got none for {missing}; it has "
                    f"{sorted(self.weights)}."
                )
            return torch.tensor([self.weights[task] for task in tasks], dtype=torch.float64)
        if len(self.weights) != len(tasks):
            raise ValueError(
                f"`weights` must have {len(tasks)} entries for the tasks {list(tasks)}, got "
                f"{len(self.weights)}. Where tasks can be absent, give the weights by name."
            )
        return torch.tensor(self.weights, dtype=torch.float64)
