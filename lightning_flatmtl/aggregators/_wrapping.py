"""Aggregators that are made of others: state and hooks of the parts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.engine.aggregation import Requires

__all__ = ["Wrapping", "checked_aggregator"]


class Wrapping(Aggregator, ABC):
    """An aggregator that asks others, which are in no Trainer themselves.

    It stands in the Trainer for them: they get its hooks (a learned weight moves before the
    optimizer step, FAMO looks at the losses after it), their states lie in its own, and they are
    reset with it.
    """

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Aggregator]:
        """The aggregators that it asks, by a name for the state."""

    @property
    def made_of(self) -> tuple[Aggregator, ...]:
        """The aggregators that it was given; the last one gives the direction."""
        return tuple(self.parts.values())

    @property
    @override
    def follows_scale(self) -> bool:
        return self.made_of[-1].follows_scale

    @property
    @override
    def requires(self) -> Requires:
        return self.made_of[-1].requires

    @property
    @override
    def state_key(self) -> str:
        # The state of other parts is another callback's, as that of another method is.
        parts = ", ".join(part.state_key.rpartition(".")[2] for part in self.made_of)
        return f"{super().state_key}({parts})"

    @property
    @override
    def needs_losses_after_step(self) -> bool:
        return any(part.needs_losses_after_step for part in self.parts.values())

    def step(self) -> None:
        """Move what the parts learn; a Trainer does this with every optimizer step."""
        self._close("step")

    def end_epoch(self) -> None:
        """Close an epoch of the parts that count them; a Trainer does this."""
        self._close("end_epoch")

    def _close(self, name: str) -> None:
        for part in self.parts.values():
            close = getattr(part, name, None)
            if close is not None:
                close()

    @override
    def reset(self) -> None:
        super().reset()
        for part in self.parts.values():
            part.reset()

    @override
    def get_state(self) -> dict[str, Any]:
        states = {name: part.get_state() for name, part in self.parts.items()}
        return {"parts": states} if any(states.values()) else {}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            if state["parts"].get(name):
                part.set_state(state["parts"][name])


_OF_THE_CALLBACK = {"on_exception", "on_save_checkpoint", "on_load_checkpoint"}
"""Those belong to the callback in the Trainer; the parts are told by reset and state."""


def _handed_on(name: str) -> Any:
    def hook(self: Wrapping, *args: Any, **kwargs: Any) -> None:
        getattr(super(Wrapping, self), name)(*args, **kwargs)
        for part in self.parts.values():
            getattr(part, name)(*args, **kwargs)

    hook.__name__, hook.__qualname__ = name, f"{Wrapping.__name__}.{name}"
    hook.__doc__ = "Called by the Trainer; handed on to the parts."
    return hook


# All hooks there are, so that a part may be anybody's own aggregator.
for _name in dir(Callback):
    if _name.startswith("on_") and _name not in _OF_THE_CALLBACK:
        setattr(Wrapping, _name, _handed_on(_name))


def checked_aggregator(name: str, given: object) -> Aggregator:
    """``given``, refused if it is no aggregator.

    Raises:
        TypeError: If so.
    """
    if not isinstance(given, Aggregator):
        got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"`{name}` must be an aggregator, such as `CAGrad()`, got {got}.")
    return given
