"""An error of one process, kept until the sums that the processes make anyway tell the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.distributed import waiting_layers

__all__ = ["Failure"]


class Failure:
    """The error of this process in one step, if it has one.

    Between two exchanges nobody listens: a process that raised there would leave the others waiting
    for its part. It keeps the error instead and takes part in the exchanges that are under way,
    with whatever it has; the next sum carries :attr:`flag`, and then all processes raise.

    With one process nothing is kept.

    Args:
        processes: The processes that share the step.
        module: The model.
    """

    def __init__(self, processes: Processes, module: nn.Module) -> None:
        self.error: Exception | None = None
        self._processes, self._module = processes, module

    @property
    def flag(self) -> float:
        """What this process adds to the number of those that have failed."""
        return float(self.error is not None)

    @contextmanager
    def kept(self, meeting: bool = True) -> Iterator[None]:
        """Run the block; where others wait for this process, an error in it is kept.

        It is not where the layers of the model make exchanges of their own in the block (those of
        SyncBatchNorm and of sharded parameters): the others are in the middle of one, and learn of
        the error when this process ends.

        Args:
            meeting: Whether such layers may be run in the block.
        """
        try:
            yield
        except Exception as error:
            alone = self._processes.size == 1
            if alone or (meeting and waiting_layers(self._module)):
                raise
            self.error = error if self.error is None else self.error

    def take(self) -> Exception | None:
        """The error, if there is one, to be told now; it is not kept any longer."""
        error, self.error = self.error, None
        return error

    def meet(self) -> None:
        """Tell by an exchange of its own, where no sum is made any more; see :meth:`tell`."""
        if self._processes.size > 1:
            mine = torch.tensor([self.flag], dtype=torch.float64)
            self.tell(float(self._processes.sum_on_host(mine)))

    def tell(self, failed: float) -> None:
        """Raise if any process has failed: that one its error, the others say who and why.

        Args:
            failed: The sum of all processes' flags.

        Raises:
            ProcessError: If another process has failed and this one has not.
        """
        if failed > 0:
            self._processes.end(self.take())
