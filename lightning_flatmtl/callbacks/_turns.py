"""Which batches of a training a diagnostic looks at, and the means of what it has found there."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["Means", "Turns"]


class Turns:
    """Which batches are looked at.

    Args:
        every_n_steps: Every n-th batch, at least 1; ``None`` for those of the steps in which the
            Trainer logs. The first batch of every epoch always is.

    Raises:
        ValueError: If it is out of its bounds.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        n = every_n_steps
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ValueError(f"`every_n_steps` must be an integer >= 1 or None, got {n!r}.")
        self.every_n_steps = n
        self.forget()

    def forget(self) -> None:
        """A fit begins."""
        self.due = False
        """Whether a batch is to be looked at; it stays so until one could be."""
        self._seen = 0

    def begin_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """A batch of training begins; in all processes alike."""
        self.due = self.due or batch_idx == 0 or self._is_turn(trainer)
        self._seen += 1

    def _is_turn(self, trainer: Trainer) -> bool:
        if self.every_n_steps is None:
            logs: bool = trainer._logger_connector.should_update_logs
            return logs
        return self._seen % self.every_n_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit goes on from."""
        return {"seen": self._seen, "due": self.due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._seen, self.due = int(state["seen"]), bool(state["due"])


class Means:
    """The means of figures by their names."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        """Sum and total weight by name."""

    def add(self, figures: Mapping[str, float], weight: float = 1.0) -> None:
        """Take figures in."""
        for name, value in figures.items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + weight * value, total[1] + weight

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        sums, self.sums = self.sums, {}
        return {name: total / weight for name, (total, weight) in sums.items() if weight}

    def merge(self, others: Mapping[str, list[float]]) -> None:
        """Add the :attr:`sums` of another process."""
        for name, (value, weight) in others.items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + weight
