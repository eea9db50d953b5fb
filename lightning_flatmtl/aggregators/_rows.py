"""Task gradients that a method keeps between steps, by part and task."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["KeptRows"]


class KeptRows:
    """Rows ``[d]`` by part (loss part, flat part) and task, at least in 32 bits.

    A task that is absent from a step keeps its row. A row of another length belongs to other
    trainable parameters: the task begins anew.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Tensor]] = {}

    def move(
        self, part: str, tasks: tuple[str, ...], rows: Iterable[Tensor], share: float
    ) -> list[Tensor]:
        """Move the kept rows to the new ones, and return them.

        Args:
            part: The part.
            tasks: The tasks of ``rows``.
            rows: The new rows.
            share: What is left of the old ones, in ``[0, 1)``; a task's first row is taken whole.
        """
        kept = self._rows.setdefault(part, {})
        for task, row in zip(tasks, rows, strict=True):
            new = row.to(torch.promote_types(row.dtype, torch.float32))
            old = kept.get(task)
            if old is not None and old.shape == new.shape and share > 0:
                kept[task] = torch.lerp(new, old.to(new), share)
            else:
                kept[task] = new.clone() if new is row else new
        return [kept[task] for task in tasks]

    def known(self, part: str, tasks: tuple[str, ...], width: int) -> dict[str, Tensor]:
        """Those of ``tasks`` that have a row of this width."""
        kept = self._rows.get(part, {})
        return {task: kept[task] for task in tasks if task in kept and len(kept[task]) == width}

    def clear(self) -> None:
        """Forget all."""
        self._rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """The rows by part and task."""
        return {part: dict(rows) for part, rows in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._rows = {part: dict(rows) for part, rows in state.items()}
