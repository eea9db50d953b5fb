"""What a step refuses: losses that are no scalars, what has no graph, what is not finite."""

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_flatmtl.engine.errors import NonFiniteError, ScaledOverflowError

__all__ = ["Finite", "check_graphs", "check_scalars"]


class Finite:
    """Stops at what is NaN or infinite: an error, or, under loss scaling, a step to be skipped.

    Args:
        tasks: The names for the messages.
        scaled: Whether the losses are scaled, so that an overflow is to be expected.
    """

    def __init__(self, tasks: tuple[str, ...], scaled: bool) -> None:
        self._tasks = tasks
        self._scaled = scaled

    def __call__(self, values: Tensor, what: str) -> None:
        """Look at one value per task."""
        for task, value in zip(self._tasks, values.tolist(), strict=True):
            if math.isfinite(value):
                continue
            if self._scaled:
                raise ScaledOverflowError(f"the {what} of task '{task}'")
            raise NonFiniteError(
                f"The {what} of task '{task}' must be finite, got {value}. Look at the batch and "
                "the loss of that task, or lower the learning rate (or rho, with TaskSAM)."
            )


def check_scalars(losses: Mapping[str, Tensor]) -> None:
    """Refuse what is not a scalar tensor.

    Raises:
        ValueError: If there is such a loss; the message names the task.
    """
    for task, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            tensor = isinstance(loss, Tensor)
            got = f"a tensor of shape {list(loss.shape)}" if tensor else type(loss).__name__
            advice = (
                "Reduce it, for example with `.mean()`."
                if tensor
                else ("Return the tensor itself, one for each task.")
            )
            raise ValueError(
                f"The loss of task '{task}' must be a scalar tensor, got {got}. {advice}"
            )


def check_graphs(losses: Mapping[str, Tensor]) -> None:
    """Refuse losses that cannot be differentiated; see :func:`check_scalars`."""
    check_scalars(losses)
    for task, loss in losses.items():
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of task '{task}' must depend on a trainable parameter, got one without "
                "a graph. Unfreeze a parameter that it uses, or leave the task out."
            )
