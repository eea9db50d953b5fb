"""Which tasks come in which step of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_flatmtl.data._rounding import systematic

__all__ = ["Measures", "Order", "TaskOrder"]

Order = Literal["round_robin", "proportional", "temperature"]


class Measures(NamedTuple):
    """What the loaders are like, task by task."""

    lengths: Sequence[int | None]
    """Batches of an epoch; ``None`` where it is not known."""
    sizes: Sequence[float | None]
    """Samples; ``None`` where it is not known."""


class TaskOrder:
    """The tasks of every step. For Lightning it is one more loader: told of epochs, with a state.

    Args:
        tasks: Their names.
        order: See :class:`~lightning_flatmtl.data.TaskLoader`, as for the rest.
        temperature: In (0, inf].
        steps: Steps of an epoch; ``None`` for as many as the loaders suggest.
        tasks_per_step: Different tasks in a step.
        seed: Of the draws, with the epoch.
        measure: Tells what the loaders are like, at the time it is asked.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        order: Order,
        temperature: float,
        steps: int | None,
        tasks_per_step: int,
        seed: int,
        measure: Callable[[], Measures],
    ) -> None:
        self.tasks = list(tasks)
        self.order, self.temperature, self.steps = order, temperature, steps
        self.tasks_per_step, self.seed = tasks_per_step, seed
        self._measure = measure
        self.epoch = 0
        self.taken = 0
        """Steps of the epoch that have been handed out."""
        self._loaded: dict[str, int] | None = None

    @property
    def sampler(self) -> TaskOrder:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch it is."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, if the next epoch that is asked for is the same one."""
        self._loaded = dict(state_dict)

    def begin(self) -> int:
        """How many steps of the epoch that begins now are over already."""
        loaded, self._loaded = self._loaded, None
        same = loaded is not None and loaded["epoch"] == self.epoch
        self.taken = loaded["taken"] if loaded is not None and same else 0
        if self.taken >= len(self):
            self.taken = 0
        return self.taken

    def __len__(self) -> int:
        if self.steps is not None:
            return self.steps
        lengths = self._known(self._measure().lengths, "steps", "a length")
        total: int = len(lengths) * max(lengths) if self.order == "round_robin" else sum(lengths)
        return math.ceil(total / self.tasks_per_step)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for step in self.plan():
            yield tuple(self.tasks[t] for t in step)

    def plan(self) -> NDArray[np.int64]:
        """The tasks of every step of the epoch, int64 ``[steps, tasks_per_step]``, each ascending.

        It depends on the seed, the epoch and what the loaders are like only.
        """
        steps, at_once = len(self), self.tasks_per_step
        if self.order == "round_robin":
            turns = np.arange(steps * at_once) % len(self.tasks)
            return np.sort(turns.reshape(steps, at_once), axis=1)
        rng = np.random.default_rng([self.seed, self.epoch])
        counts = systematic(self.expected(), rng.random())
        # Task by task into the columns, one column after the other: a task that comes at most once
        # for each row is in no row twice.
        tasks = rng.permutation(len(self.tasks))
        table = np.repeat(tasks, counts[tasks]).reshape(at_once, steps).T
        return np.sort(table[rng.permutation(steps)], axis=1)

    def expected(self) -> NDArray[np.float64]:
        """In how many steps of an epoch each task is on average, at most in all."""
        steps = len(self)
        if self.order == "round_robin":
            return np.full(len(self.tasks), steps * self.tasks_per_step / len(self.tasks))
        measures = self._measure()
        if self.order == "proportional":
            weights = np.array(self._known(measures.lengths, "sizes", "a length"), np.float64)
        else:
            sizes = self._known(measures.sizes, "sizes", "a data set with a length")
            logs = np.log(np.array(sizes, np.float64)) / self.temperature
            weights = np.exp(logs - logs.max())
        places = np.zeros(len(weights))
        full = np.zeros(len(weights), bool)
        while True:  # a task that fills all steps leaves the rest to the others
            free = self.tasks_per_step - full.sum()
            places[full] = steps
            places[~full] = steps * free * weights[~full] / weights[~full].sum()
            over = ~full & (places > steps * (1 + 1e-12))
            if not over.any():
                return np.minimum(places, steps)
            full |= over

    def _known(self, values: Sequence[Any], argument: str, what: str) -> list[Any]:
        for task, value in zip(self.tasks, values, strict=True):
            if value is None:
                raise ValueError(
                    f"The loader of '{task}' must have {what}, got one without. Pass `{argument}`."
                )
        return list(values)
