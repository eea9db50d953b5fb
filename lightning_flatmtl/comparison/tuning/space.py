"""What an argument may be: in the words of Optuna's ``suggest_float`` and its relatives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Space"]

_FORMS = (
    "`{low: 1.0e-4, high: 0.1, log: true}`, `{low: 0.0, high: 2.0, step: 0.5}` or "
    "`{choices: [a, b]}`"
)
_RANGE = {"low", "high", "step", "log"}


@dataclass(frozen=True)
class Space:
    """The values of one argument.

    Args:
        low: The smallest; ``None`` with choices.
        high: The largest.
        step: The distance of the values; ``None`` for all between.
        log: Whether to search on a logarithmic scale.
        choices: The values, where they are listed.
    """

    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, name: str, given: Any) -> "Space":
        """Read what a file says.

        Args:
            name: The argument, for messages.
            given: A mapping.

        Raises:
            ValueError: If it is no such mapping, or its bounds are none.
        """
        setting = f"`search` of '{name}'"
        if not isinstance(given, Mapping) or not (
            set(given) == {"choices"} or {"low", "high"} <= set(given) <= _RANGE
        ):
            raise ValueError(f"{setting} must be {_FORMS}, got {given!r}.")
        if "choices" in given:
            return cls(choices=_choices(setting, given["choices"]))
        return _range(setting, given)

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        given = [each for each in (self.low, self.high, self.step) if each is not None]
        return not self.choices and all(isinstance(each, int) for each in given)

    def like(self, value: Any) -> "Space":
        """The same for an argument that is a float, where bounds are written as integers."""
        if self.choices or not isinstance(value, float):
            return self
        step = None if self.step is None else float(self.step)
        return replace(self, low=float(self.low or 0), high=float(self.high or 0), step=step)

    def suggest(self, trial: Any, name: str) -> Any:
        """What a trial of Optuna is given."""
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if self.whole:
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values that show whether the argument takes them: the bounds, or all choices."""
        return self.choices or (self.low, self.high)

    @property
    def setting(self) -> dict[str, Any]:
        """What a file would say."""
        if self.choices:
            return {"choices": list(self.choices)}
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            found["step"] = self.step
        return {**found, "log": True} if self.log else found


def _choices(setting: str, given: Any) -> tuple[Any, ...]:
    plain = isinstance(given, list | tuple) and all(
        each is None or isinstance(each, bool | int | float | str) for each in given
    )
    if not plain or not given:
        raise ValueError(
            f"`choices` of {setting} must be a list of texts, numbers, true, false or null, got "
            f"{given!r}."
        )
    twice = [each for i, each in enumerate(given) if each in given[:i]]
    if twice:
        raise ValueError(
            f"`choices` of {setting} must differ, got {twice[0]!r} more than once. Remove one."
        )
    return tuple(given)


def _range(setting: str, given: Mapping[str, Any]) -> Space:
    low: Any = given["low"]
    high: Any = given["high"]
    step: Any = given.get("step")
    log = given.get("log", False)
    value: Any
    for name, value in (("low", low), ("high", high), ("step", step)):
        if value is None and name == "step":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"`{name}` of {setting} must be a finite number, got {value!r}.")
    if not low < high:
        raise ValueError(f"{setting} must have low < high, got low {low} and high {high}.")
    if not isinstance(log, bool):
        raise ValueError(f"`log` of {setting} must be true or false, got {log!r}.")
    if log and low <= 0:
        raise ValueError(f"`low` of {setting} must be > 0 on a logarithmic scale, got {low}.")
    if log and step is not None:
        raise ValueError(f"{setting} must have `step` or `log`, got both. Remove one of them.")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"`step` of {setting} must be in (0, {high - low:g}], got {step}.")
    return Space(low, high, step, log)
