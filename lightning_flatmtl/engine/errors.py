"""What the engine raises."""

__all__ = ["FlatMTLError", "NonFiniteError", "ScaledOverflowError"]


class FlatMTLError(Exception):
    """Base of the errors that only this package raises."""


class NonFiniteError(FlatMTLError, ValueError):
    """A loss or a gradient of a task is NaN or infinite; the message names the task."""


class ScaledOverflowError(FlatMTLError):
    """A loss or gradient overflowed under loss scaling; the step is skipped, nobody sees this."""
