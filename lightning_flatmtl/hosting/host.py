"""What the callbacks ask of a module that runs its own steps."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_flatmtl.engine import Passes
from lightning_flatmtl.hosting.fit import Fit
from lightning_flatmtl.hosting.task_metrics import TaskMetrics
from lightning_flatmtl.task import Task

__all__ = ["Host"]


class Host:
    """A module that runs Algorithm 1 itself, with the callbacks of its Trainer."""

    tasks: list[Task]
    baselines: dict[str, float] | None
    task_metrics: TaskMetrics
    listeners: list[Callable[[str, Any, Any], None]]
    """Get a task's name, predictions and target whenever its metrics do; they change nothing."""
    gradients: str
    _fit: Fit

    def start_fit(self, trainer: Trainer) -> Fit:
        """Forget what an earlier fit found out; called before the first batch of every fit."""
        raise NotImplementedError

    def declare_partition(self) -> None:
        """Begin with the parameters that the module declares; called once they all exist."""
        raise NotImplementedError

    def relative_improvement(self, stage: str, loader: int = 0) -> float | None:
        """Delta_m of the epoch, ``None`` without baselines or while a metric has no value."""
        raise NotImplementedError

    def passes_of(self, batch: Any, batch_idx: int) -> Passes:
        """The passes of any batch, for who looks at the module without a trace."""
        raise NotImplementedError

    @property
    def compilable(self) -> tuple[str, ...]:
        """The methods that ``torch.compile(module)`` is to compile in training."""
        raise NotImplementedError
