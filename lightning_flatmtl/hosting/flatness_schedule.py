"""When in a fit the second passes run, and how far they go."""

import math
from dataclasses import dataclass, replace
from numbers import Real

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_flatmtl.engine import Sharpness

__all__ = ["FlatnessSchedule", "updates_of"]


@dataclass(frozen=True)
class FlatnessSchedule:
    r"""When in a fit the second passes run, and how far they go.

    Args:
        start: The share of the fit that is trained by the plain method first, in ``[0, 1)``.
        rho_warmup: Updates, from there on, over which the radii grow to their full size: the n-th
            has :math:`n / (\text{rho\_warmup} + 1)` of them. At least 0.

    Raises:
        ValueError: If a value is out of its bounds.
    """

    start: float = 0.0
    rho_warmup: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.start, Real) and not isinstance(self.start, bool)
        if not number or not 0 <= self.start < 1:
            raise ValueError(f"`start` must be in [0, 1), got {self.start!r}.")
        warmup = self.rho_warmup
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"`rho_warmup` must be an integer >= 0, got {warmup!r}.")

    def at(self, update: int, updates: float, sharpness: Sharpness) -> Sharpness | None:
        """The perturbations of one update; ``None`` for the plain method.

        Args:
            update: How many updates there have been.
            updates: How many there are to be in the whole fit; not asked if ``start`` is 0.
            sharpness: The perturbations at their full size.
        """
        first = math.ceil(self.start * updates) if self.start else 0
        if update < first:
            return None
        reached = update - first + 1
        if reached > self.rho_warmup:
            return sharpness
        share = reached / (self.rho_warmup + 1)
        return replace(
            sharpness,
            rho_shared=sharpness.rho_shared * share,
            rho_heads=sharpness.rho_heads * share,
        )


def updates_of(trainer: Trainer) -> float:
    """How many updates a fit has, as its Trainer reckons.

    Raises:
        MisconfigurationException: If the fit has no end that can be counted.
    """
    updates = float(trainer.estimated_stepping_batches)
    if updates == math.inf:
        raise MisconfigurationException(
            "TaskSAM(start=...) is a share of the fit, whose length must be known: expected "
            f"max_epochs or max_steps, got max_epochs={trainer.max_epochs} and "
            f"max_steps={trainer.max_steps} with {trainer.num_training_batches} batches an epoch. "
            "Set one of the two, or start=0."
        )
    return updates
