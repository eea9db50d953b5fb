"""Smooth Tchebycheff scalarization."""

import math
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.aggregators._preference import Preference
from lightning_flatmtl.functional import scale_invariant_weights, stch_weights

__all__ = ["STCH"]


@final
class STCH(LossWeighting):
    r"""Smooth Tchebycheff scalarization (Lin et al., 2024).

    `arXiv:2402.19078 <https://arxiv.org/abs/2402.19078>`_, on the logarithms of the losses as in
    the published multi-task experiments: descends on :math:`m \mu \log \sum_i \exp(p_i \log(L_i /
    z_i) / \mu)`, a smooth maximum, heads included. The :math:`z_i` are the mean losses of epoch
    ``warmup_epochs`` (counted from 0); up to and including that epoch it is
    :class:`ScaleInvariant`. The losses must be positive.

    Args:
        mu: Smoothness, in ``(0, inf)``; small is close to the maximum.
        warmup_epochs: Epochs before the one that the :math:`z_i` are taken from, at least 0.
        preference: Exponents :math:`p_i`, by name or in the order of the tasks, each in
            ``[0, inf)``; all ones by default.

    Raises:
        ValueError: If an argument is out of its bounds, or a loss is missing or not positive.

    Example:
        >>> import torch
        >>> stch = STCH(mu=0.5, warmup_epochs=0)
        >>> _ = stch(torch.eye(2), losses=[1.0, 1.0])
        >>> stch.end_epoch()
        >>> stch(torch.eye(2), losses=[1.0, 2.0])  # the second task counts more
        tensor([0.4000, 0.8000])
    """

    def __init__(
        self,
        mu: float = 1.0,
        warmup_epochs: int = 4,
        preference: dict[str, float] | list[float] | None = None,
    ) -> None:
        if not 0 < mu < math.inf:
            raise ValueError(f"`mu` must be in (0, inf), got {mu}.")
        if not isinstance(warmup_epochs, int) or warmup_epochs < 0:
            raise ValueError(f"`warmup_epochs` must be an integer >= 0, got {warmup_epochs!r}.")
        self.mu = mu
        self.warmup_epochs = warmup_epochs
        self.preference = preference
        self._preference = Preference(preference)
        self._epoch = 0
        self._sums: dict[str, list[float]] = {}
        """By task: sum and number of the losses of the epoch that the reference is taken from."""

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        values = positive(self, tasks, losses)
        # A task that appears later gets its reference from the first loss seen.
        late = self._epoch > self.warmup_epochs
        self._note([t for t in tasks if not late or t not in self._sums], tasks, values)
        if not late:
            return scale_invariant_weights(values)
        sums = (self._sums[task] for task in tasks)
        reference = [total / count for total, count in sums]
        return stch_weights(values, reference, self.mu, self._preference.of(tasks))

    def _note(self, wanted: list[str], tasks: tuple[str, ...], values: Tensor) -> None:
        if self._epoch < self.warmup_epochs:
            return
        for task, loss in zip(tasks, values.tolist(), strict=True):
            if task in wanted:
                total, count = self._sums.get(task, (0.0, 0.0))
                self._sums[task] = [total + loss, count + 1]

    def end_epoch(self) -> None:
        """Close an epoch; a Trainer does this."""
        self._epoch += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.end_epoch()

    @override
    def reset(self) -> None:
        super().reset()
        self._epoch = 0
        self._sums.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "sums": {t: list(s) for t, s in self._sums.items()}}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._sums = {t: list(s) for t, s in state["sums"].items()}
