"""What the engine raises."""

__all__ = ["FlatMTLError", "NonFiniteError"]


class FlatMTLError(Exception):
    """Base of the errors that only this package raises."""


class NonFiniteError(FlatMTLError, ValueError):
    """A loss or a gradient of a task is NaN or infinite; the message names the task."""
