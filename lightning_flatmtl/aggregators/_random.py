"""Private random numbers: drawn on the CPU, so that all ranks agree, and saved with the run."""

from typing import Any

import torch
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator

__all__ = ["RandomAggregator"]


class RandomAggregator(Aggregator):
    """An aggregator that draws from a generator of its own, on the CPU.

    Args:
        seed: Seed of the generator, ``seed >= 0``.

    Raises:
        ValueError: If ``seed`` is negative or not an integer.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}.")
        self.seed = seed
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    @override
    def reset(self) -> None:
        super().reset()
        self._generator.manual_seed(self.seed)

    @override
    def get_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
