"""The clean pass of a step: losses, who reaches what, and what the processes agree on."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_flatmtl.engine.checks import check_graphs
from lightning_flatmtl.engine.gradients.penalty import (
    PENALTY,
    checked_penalty,
    note_reached,
)
from lightning_flatmtl.engine.parameters.backward import observe_by_backward
from lightning_flatmtl.engine.parameters.sharded import reshard
from lightning_flatmtl.engine.parameters.unregistered import with_unregistered
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.processes.base import Agreement, Processes
from lightning_flatmtl.engine.processes.distributed import synchronised_layers
from lightning_flatmtl.engine.processes.failure import Failure
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["CleanPass", "substitute_task"]


class CleanPass:
    """Runs the clean pass and brings the processes together on it.

    Args:
        partition: Notes who reaches what.
        processes: The processes that share every step.
    """

    def __init__(self, partition: Partition, processes: Processes) -> None:
        self.partition, self.processes = partition, processes
        self._probed: set[str] = set()

    def named(
        self, module: nn.Module, optimized: Iterable[Tensor], failure: Failure
    ) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        if self.processes.sharded:
            reshard(module)  # its layers show other parameters during the passes
        named = dict(module.named_parameters())
        with failure.kept(meeting=False):
            return with_unregistered(named, optimized, module, self.processes)
        return named

    def losses(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        passes: Passes,
        sharpness: Sharpness | None,
        last: bool,
        by_task: bool,
        failure: Failure,
    ) -> tuple[dict[str, Tensor], Tensor | None, Agreement]:
        """Losses and penalty of this process, and what all processes have."""
        plan, error = None, None
        try:
            plan = passes.planned()
        except Exception as raised:
            error = raised
        self.processes.check_plan(plan, module, error)
        losses: dict[str, Tensor] = {}
        penalty: Tensor | None = None
        with failure.kept(meeting=False):
            if sharpness is not None:
                passes.keep_start()
            # The mean over no samples is no loss; it may be NaN.
            losses = {task: loss for task, loss in passes.clean().items() if passes.count(task) > 0}
            check_graphs(losses)
            if losses and passes.penalty is not None:
                penalty = checked_penalty(passes.penalty(), self.processes)
                note_reached(penalty, self.partition, self.processes)
            if not self.processes.sharded:
                self.partition.share(passes.common)
                self.partition.observe(losses)
                if self.partition.needs_backward and by_task:
                    self._probe(module, named, losses)
        counts = {task: passes.count(task) for task in losses}
        if penalty is not None:
            counts[PENALTY] = 1.0
        agreed = self.processes.agree(counts, self.partition, module, named, last, failure.take())
        if self.processes.sharded:  # then all processes have the same tasks
            self._probe(module, named, losses)
        return losses, penalty, agreed

    def _probe(
        self, module: nn.Module, named: Mapping[str, nn.Parameter], losses: dict[str, Tensor]
    ) -> None:
        """Find out what new losses reach, where the graph does not show it."""
        new = {task: loss for task, loss in losses.items() if task not in self._probed}
        if new:
            params = [p for p in named.values() if p.requires_grad]
            observe_by_backward(self.partition, new, module, params)
            self._probed.update(new)


def substitute_task(
    processes: Processes, module: nn.Module, shares: Mapping[str, float]
) -> str | None:
    """A task of this process to go through layers that wait for the other processes."""
    if processes.size == 1 or not synchronised_layers(module):
        return None
    return next((task for task, share in shares.items() if share), None)
