"""Weights learned from how much each loss fell."""

from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._learned import LearnedWeights
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.functional import famo_gradient, famo_weights
from lightning_flatmtl.hosting.automatic import host_of

__all__ = ["FAMO"]


@final
class FAMO(LearnedWeights, LossWeighting):
    r"""Fast adaptive multitask optimization (FAMO; Liu et al., 2023).

    `arXiv:2306.03792 <https://arxiv.org/abs/2306.03792>`_: the weights, heads included, are
    :math:`w_i = c\, z_i / L_i` with :math:`z = \mathrm{softmax}(\xi)` and :math:`c = 1 / \sum_j
    (z_j / L_j)`. After the optimizer's step the losses of the same batch are computed once more,
    and :math:`\xi` moves so that the task whose logarithm of the loss fell least counts more. Costs
    one forward pass a step. The losses must be positive.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Args:
        lr: Learning rate of :math:`\xi`, in ``(0, inf)``.
        weight_decay: Pull of :math:`\xi` towards equal weights, in ``[0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds, or a loss is missing or not positive.

    Example:
        >>> import torch
        >>> famo = FAMO()
        >>> famo(torch.eye(2), losses=[1.0, 3.0])
        tensor([0.7500, 0.2500])
        >>> famo.update(("0", "1"), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 3.0]))
        >>> bool(famo(torch.eye(2), losses=[1.0, 3.0])[1] > 0.25)
        True
    """

    def __init__(self, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__(lr, weight_decay)
        self.weight_decay = weight_decay
        self._steps = 0
        """The Trainer's count of optimizer steps at the last batch."""

    @property
    @override
    def needs_losses_after_step(self) -> bool:
        return True

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return famo_weights(self._scalars.values(tasks), positive(self, tasks, losses))

    def update(self, tasks: tuple[str, ...], before: Tensor, after: Tensor) -> None:
        """Move the weights after a step; a Trainer does this.

        Args:
            tasks: The tasks of the batch.
            before: Their losses before the step, ``[m]``.
            after: Their losses on the same batch after it, ``[m]``.
        """
        old, new = (positive(self, tasks, losses.double()) for losses in (before, after))
        self._scalars.accumulate(tasks, famo_gradient(self._scalars.values(tasks), old, new))
        self.step()

    @override
    def reset(self) -> None:
        super().reset()
        self._steps = 0

    @override
    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "steps": self._steps}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._steps = state["steps"]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped = trainer.global_step != self._steps
        self._steps = trainer.global_step
        host = host_of(pl_module)
        # Not from `outputs`, which are whatever an override of `training_step` returns.
        before = {} if host.last_step is None else host.last_step.update_losses
        if not stepped or not before or self._skipped:
            return
        after = host.losses_again(batch, batch_idx)
        tasks = tuple(before)
        self.update(
            tasks,
            torch.stack([before[task] for task in tasks]).cpu(),
            torch.stack([after[task] for task in tasks]).cpu(),
        )
