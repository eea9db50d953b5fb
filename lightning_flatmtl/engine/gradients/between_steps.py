"""What the second passes remember from step to step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.flat_parts import FlatParts
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["BetweenSteps"]


class BetweenSteps:
    """What the second passes remember: flat parts that are used again, and a random stream.

    Args:
        seed: Seed of the stream, which is the same in all processes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        """Draws what a perturbation is estimated with."""
        self.flat: FlatParts | None = None
        """The flat parts, where they are kept."""
        self._loaded: Mapping[str, Any] | None = None

    def begin_update(self, sharpness: Sharpness | None) -> None:
        """An update with these perturbations begins."""
        if sharpness is None or not sharpness.keeps:
            self.flat = None  # those of long ago would be no use
            return
        if self.flat is None:
            self.flat = FlatParts()
            if self._loaded is not None:
                self.flat.load_state_dict(self._loaded)
        self._loaded = None
        self.flat.begin_update(sharpness)

    def begin_batch(self, samples: Mapping[str, float]) -> None:
        """A batch of the update begins, with these samples of every task in all processes."""
        if self.flat is not None:
            self.flat.begin_batch(samples)

    def end_update(self) -> None:
        """The update is right: what it has renewed is kept."""
        if self.flat is not None:
            self.flat.settle()

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """All of it, with the parameters by their names."""
        flat = None
        if self.flat is not None:
            flat = self.flat.state_dict(names)
        elif self._loaded is not None:  # no update has come by since
            flat = {key: value for key, value in self._loaded.items() if key != "names"}
        return {"generator": self.generator.get_state(), "flat": flat}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        """Continue from :meth:`state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        if state["flat"] is not None:
            self._loaded = {**state["flat"], "names": dict(names)}
