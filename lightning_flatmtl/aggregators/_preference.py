"""Preferences among tasks, by name or in their order."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Preference"]


class Preference:
    """Non-negative weights of the tasks.

    Args:
        values: By name, or in the order of the tasks, each in ``[0, inf)``; ``None`` for equal.
        name: How the argument is called in messages.
        positive: Whether zero is refused.

    Raises:
        ValueError: If a value is out of its bounds.
    """

    def __init__(
        self,
        values: Mapping[str, float] | list[float] | None,
        name: str = "preference",
        positive: bool = False,
    ) -> None:
        for value in (values.values() if isinstance(values, Mapping) else values) or ():
            if not 0 <= value < math.inf or (positive and value == 0):
                bounds = "(0, inf)" if positive else "[0, inf)"
                raise ValueError(f"`{name}` must be in {bounds}, got {value}.")
        self._values = values
        self._name = name

    def of(self, tasks: tuple[str, ...]) -> Tensor | None:
        """The weights of ``tasks``, shape ``[m]``; ``None`` for equal ones.

        Raises:
            ValueError: If they do not fit the tasks.
        """
        values = self._values
        if values is None:
            return None
        if isinstance(values, Mapping):
            missing = [task for task in tasks if task not in values]
            if missing:
                raise ValueError(
                    f"`{self._name}` must have an entry for every task, got none for {missing}; it "
                    f"has {sorted(values)}."
                )
            return torch.tensor([values[task] for task in tasks], dtype=torch.float64)
        if len(values) != len(tasks):
            raise ValueError(
                f"`{self._name}` must have {len(tasks)} entries for the tasks {list(tasks)}, got "
                f"{len(values)}. Where tasks can be absent, give the weights by name."
            )
        return torch.tensor(values, dtype=torch.float64)

    def shares(self, tasks: tuple[str, ...]) -> Tensor | None:
        """The weights of ``tasks`` divided by their sum; ``None`` for equal ones.

        Raises:
            ValueError: If they do not fit the tasks, or are all zero.
        """
        weights = self.of(tasks)
        if weights is None:
            return None
        if not weights.sum() > 0:
            raise ValueError(
                f"`{self._name}` must be positive for one of {list(tasks)}, got zeros."
            )
        return weights / weights.sum()
