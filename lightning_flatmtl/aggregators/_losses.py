"""Losses that a method needs, checked."""

from torch import Tensor

from lightning_flatmtl.functional._vectors import LEAST_LOSS

__all__ = ["given", "positive"]


def given(method: object, losses: Tensor | None) -> Tensor:
    """The losses.

    Raises:
        ValueError: If there are none.
    """
    if losses is None:
        raise ValueError(f"{method!r} needs the losses, got none; call it with `losses=`.")
    return losses


def positive(method: object, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
    """The losses, all so far above zero that they have an inverse.

    Raises:
        ValueError: If there are none, or one is not positive; the message names the task.
    """
    losses = given(method, losses)
    for task, loss in zip(tasks, losses.tolist(), strict=True):
        if not loss > 0:
            raise ValueError(
                f"{method!r} needs positive losses, got {loss} for task '{task}'. Leave a "
                "task out of a batch that has nothing for it (no loss times zero); else add a "
                "constant to that loss, or use a method that does not look at losses."
            )
    return losses.clamp(min=LEAST_LOSS)
