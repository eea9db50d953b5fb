"""What a person wants to be told in training: absent tasks, dead gradients, spare parameters."""

import warnings
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_flatmtl.engine import Partition, Sharpness, StepResult
from lightning_flatmtl.functional._convergence import not_converged
from lightning_flatmtl.hosting.names import nearest

__all__ = ["TrainingWatch"]

_DEAD_STEPS = 10
_OVERFLOWING_STEPS = 25
"""More than it takes to halve torch's first loss scale down to one."""


class TrainingWatch:
    """Looks at every step of a fit and speaks up once.

    Args:
        tasks: The names of the tasks that the module was given.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._targets: set[str] = set()
        self._zero_told = False
        self._dead_for = 0
        self._overflowing_for = 0
        self._spare_told = False
        self._absent_told = False
        self._not_converged = not_converged()
        self.skipped = 0
        """Batches of the present epoch in which no task had a label."""

    def saw_targets(self, names: set[str]) -> None:
        """Note the names of a batch's targets, for the message about a task that never comes."""
        self._targets |= names

    def after_step(
        self,
        result: StepResult,
        partition: Partition,
        module: nn.Module,
        sharpness: Sharpness | None,
    ) -> None:
        """Look at gradients and parameters."""
        self._tell_overflowing(result)
        self._tell_dead(result, sharpness)
        self._tell_zero(result)
        if self._tasks and partition.seen >= set(self._tasks):
            self._tell_spare(partition, module)

    def skip(self) -> None:
        """Count a batch in which no task had a label."""
        self.skipped += 1

    def take_skipped(self) -> int:
        """How many batches the epoch has skipped; the count begins anew."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    def epoch_counts(self) -> dict[str, float]:
        """What happened in the epoch and should not, by its name in the log; counts begin anew."""
        before, self._not_converged = self._not_converged, not_converged()
        counts = {
            "train/skipped_batches": self.take_skipped(),
            "train/not_converged": self._not_converged - before,
        }
        return {name: float(count) for name, count in counts.items() if count}

    def after_epoch(self, partition: Partition, module: nn.Module, whole: bool = True) -> None:
        """Refuse tasks that no batch of a whole epoch had; of a part of one, only say so.

        Raises:
            MisconfigurationException: If there is such a task.
        """
        absent = [task for task in self._tasks if task not in partition.seen]
        names = ", ".join(f"'{task}'" for task in absent)
        if absent and not whole:
            if not self._absent_told:
                self._absent_told = True
                rank_zero_warn(
                    f"No batch so far had targets of {names}; their heads are not trained.",
                    category=UserWarning,
                )
            return
        if absent:
            others = self._targets - set(self._tasks)
            meant = "".join(nearest(task, others) for task in absent)
            came = f", but targets of {sorted(others)}" if others else ""
            raise MisconfigurationException(
                f"Expected every task in at least one batch of the epoch, got none with {names}"
                f"{came}. {meant}Correct the name, put its targets into the batches, or remove the "
                "task."
            )
        self._tell_spare(partition, module)

    def _tell_overflowing(self, result: StepResult) -> None:
        self._overflowing_for = 0 if result.overflow is None else self._overflowing_for + 1
        if self._overflowing_for == _OVERFLOWING_STEPS:
            rank_zero_warn(
                f"{_OVERFLOWING_STEPS} steps in a row were skipped because {result.overflow} was "
                "not finite. A smaller loss scale does not mend this: look at the batch and the "
                "loss of that task, or use precision='bf16-mixed'.",
                category=RuntimeWarning,
            )

    def _tell_dead(self, result: StepResult, sharpness: Sharpness | None) -> None:
        self._dead_for = self._dead_for + 1 if result.dead else 0
        if self._dead_for != _DEAD_STEPS:
            return
        advice = "Lower the learning rate."
        if sharpness is not None and sharpness.active:
            kind = "adaptive" if sharpness.adaptive else "plain"
            advice = (
                "Too large a radius does this: lower rho, which is "
                f"{sharpness.rho_shared:g} (shared) and {sharpness.rho_heads:g} (heads), {kind}, "
                "let it grow with rho_warmup=200, or lower the learning rate."
            )
        rank_zero_warn(
            f"Training has died: every task gradient was exactly zero for {_DEAD_STEPS} steps. "
            f"{advice}",
            category=RuntimeWarning,
        )

    def _tell_zero(self, result: StepResult) -> None:
        if self._zero_told or not result.zero or len(result.zero) == len(result.update_losses):
            return
        self._zero_told = True
        names = ", ".join(f"'{task}'" for task in result.zero)
        rank_zero_warn(
            f"The loss of {names} is exactly zero, and so is its gradient. If the batch has "
            "nothing for a task, leave the task out of the losses (or return None for it) instead "
            "of a loss times zero: many methods stand still at a task with a zero gradient.",
            category=UserWarning,
        )

    def _tell_spare(self, partition: Partition, module: nn.Module) -> None:
        if self._spare_told or partition.needs_backward:
            return
        self._spare_told = True
        spare = {
            id(p) for p in partition.unreached([p for p in module.parameters() if p.requires_grad])
        }
        names = [name for name, p in module.named_parameters() if id(p) in spare]
        if names:
            shown = ", ".join(f"'{name}'" for name in names[:5]) + (
                ", ..." if len(names) > 5 else ""
            )
            warnings.warn(
                f"Expected every trainable parameter to be reached by a loss, got {len(names)} "
                f"that none reaches: {shown}. They will not be trained: freeze or remove them, or "
                "check that the model uses them.",
                UserWarning,
                stacklevel=2,
            )
