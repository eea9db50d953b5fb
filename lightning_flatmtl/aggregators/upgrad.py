"""The unconflicting projection of gradients."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._preference import Preference
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import upgrad_weights

__all__ = ["UPGrad"]


@final
class UPGrad(GramAggregator):
    r"""Unconflicting projection of gradients (UPGrad; Quinton & Rey, 2024).

    `arXiv:2406.16232 <https://arxiv.org/abs/2406.16232>`_: the mean of the projections of every
    :math:`g_i` onto the dual cone :math:`\{d : \langle g_j, d \rangle \ge 0\ \forall j\}`. No
    task's loss rises to first order, and the direction scales linearly with each gradient.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        preference: A weight per task for the mean, by name or in the order of the tasks, each in
            ``[0, inf)``; they are divided by their sum. Equal by default.

    Raises:
        ValueError: If a preference is out of its bounds, or they do not fit the tasks.

    Example:
        >>> import torch
        >>> UPGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """

    def __init__(self, preference: dict[str, float] | list[float] | None = None) -> None:
        self.preference = preference
        self._preference = Preference(preference)

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.preference is not None

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return upgrad_weights(gram, self._preference.shares(gradients.tasks))
