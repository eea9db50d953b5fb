"""Task weights that are learned: one scalar per task, with an optimizer of their own."""

import math
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator

__all__ = ["LearnedScalars", "LearnedWeights"]


class LearnedScalars:
    """One learned scalar per task, out of reach of the model's weight decay and clipping.

    They live in float64 on the CPU. A task enters at its first appearance; one that is absent from
    a step keeps its value and its moments. Gradients are averaged over the calls of
    :meth:`accumulate` between two calls of :meth:`step`, for whoever calls the aggregator by hand.

    Args:
        lr: Learning rate of Adam, in ``(0, inf)``.
        weight_decay: Pull towards zero, in ``[0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds.
    """

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"`lr` must be in (0, inf), got {lr}.")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"`weight_decay` must be in [0, inf), got {weight_decay}.")
        self._lr = lr
        self._weight_decay = weight_decay
        self._scalars: dict[str, Tensor] = {}
        self._optimizers: dict[str, torch.optim.Adam] = {}
        self._pending: dict[str, list[float]] = {}

    def reset(self) -> None:
        """Forget all tasks, their moments and the gradients noted."""
        self._scalars.clear()
        self._optimizers.clear()
        self._pending.clear()

    def values(self, tasks: tuple[str, ...]) -> Tensor:
        """The scalars of ``tasks``, shape ``[m]``."""
        return torch.stack([self._get(task).detach() for task in tasks])

    def _get(self, task: str) -> Tensor:
        if task not in self._scalars:
            self._enter(task, 0.0)
        return self._scalars[task]

    def _enter(self, task: str, value: float) -> None:
        scalar = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        self._scalars[task] = scalar
        self._optimizers[task] = torch.optim.Adam(
            [scalar], lr=self._lr, weight_decay=self._weight_decay
        )

    def accumulate(self, tasks: tuple[str, ...], gradient: Tensor) -> None:
        """Note the gradient ``[m]`` of this batch."""
        for task, value in zip(tasks, gradient.tolist(), strict=True):
            self._pending.setdefault(task, []).append(value)

    def step(self) -> None:
        """Move every scalar that has a gradient, then forget the gradients."""
        for task, noted in self._pending.items():
            self._get(task).grad = torch.tensor(sum(noted) / len(noted), dtype=torch.float64)
            self._optimizers[task].step()
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Values and moments by task name, as numbers."""
        state = {}
        for task, scalar in self._scalars.items():
            moments = self._optimizers[task].state.get(scalar, {})
            state[task] = {
                "value": scalar.item(),
                "pending": list(self._pending.get(task, [])),
                **{name: float(moment) for name, moment in moments.items()},
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.reset()
        for task, entry in state.items():
            self._enter(task, entry["value"])
            scalar = self._scalars[task]
            if entry["pending"]:
                self._pending[task] = list(entry["pending"])
            if "step" in entry:
                self._optimizers[task].state[scalar] = {
                    "step": torch.tensor(entry["step"], dtype=torch.float32),
                    "exp_avg": torch.tensor(entry["exp_avg"], dtype=torch.float64),
                    "exp_avg_sq": torch.tensor(entry["exp_avg_sq"], dtype=torch.float64),
                }


class LearnedWeights(Aggregator):
    """An aggregator with one learned scalar per task, moved with every optimizer step.

    A leaf calls ``self._scalars.accumulate`` with the scalars' gradients of a batch.

    Args:
        lr: Learning rate of the scalars, in ``(0, inf)``.
        weight_decay: Pull of the scalars towards zero, in ``[0, inf)``.
    """

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        self.lr = lr
        self._scalars = LearnedScalars(lr, weight_decay)

    @final
    def step(self) -> None:
        """Move the learned scalars; a Trainer does this with every optimizer step."""
        self._scalars.step()

    @final
    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if not self._skipped:
            self.step()

    @override
    def reset(self) -> None:
        super().reset()
        self._scalars.reset()

    @override
    def get_state(self) -> dict[str, Any]:
        return {"scalars": self._scalars.state_dict()}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._scalars.load_state_dict(state["scalars"])
