"""Weights from how fast the losses fall."""

import math
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.functional import dwa_weights

__all__ = ["DynamicWeightAverage"]


@final
class DynamicWeightAverage(LossWeighting):
    r"""Dynamic weight average (DWA; Liu et al., 2019).

    `arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_: :math:`w = m\,\mathrm{softmax}(r / T)`
    with :math:`r_i = L_i(t-1) / L_i(t-2)`, the means of the two epochs before. Until a task has two
    epochs, its :math:`r_i` is 1; an epoch in which a task is absent does not count for it.

    If all :math:`g_i = g`, the direction is :math:`m\,g`.

    Args:
        temperature: T, in ``(0, inf)``; the larger, the more equal the weights.

    Raises:
        ValueError: If ``temperature`` is out of its bounds.

    Example:
        >>> import torch
        >>> dwa = DynamicWeightAverage()
        >>> for losses in ([1.0, 1.0], [0.5, 1.0]):
        ...     _ = dwa(torch.ones(2, 1), losses=losses)
        ...     dwa.end_epoch()
        >>> dwa.loss_weights(("0", "1"), None)  # the second task is slower
        tensor([0.8756, 1.1244], dtype=torch.float64)
    """

    def __init__(self, temperature: float = 2.0) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be in (0, inf), got {temperature}.")
        self.temperature = temperature
        self._sums: dict[str, list[float]] = {}
        """By task: sum and number of the losses of the present epoch."""
        self._means: dict[str, list[float]] = {}
        """By task: the means of the last two epochs, the older one first."""

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        if losses is not None:
            for task, loss in zip(tasks, losses.tolist(), strict=True):
                total, count = self._sums.get(task, (0.0, 0.0))
                self._sums[task] = [total + loss, count + 1]
        means = (self._means.get(task, []) for task in tasks)
        older, newer = zip(*(pair if len(pair) == 2 else (1.0, 1.0) for pair in means), strict=True)
        return dwa_weights(newer, older, self.temperature)

    def end_epoch(self) -> None:
        """Close an epoch; a Trainer does this."""
        for task, (total, count) in self._sums.items():
            self._means[task] = [*self._means.get(task, [])[-1:], total / count]
        self._sums.clear()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.end_epoch()

    @override
    def reset(self) -> None:
        super().reset()
        self._sums.clear()
        self._means.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "means": dict(self._means)}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._sums, self._means = dict(state["sums"]), dict(state["means"])
