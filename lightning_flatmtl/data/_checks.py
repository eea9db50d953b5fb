"""Bounds of arguments."""

__all__ = ["check"]


def check(holds: bool, name: str, bound: str, value: object) -> None:
    """Refuse a value: ValueError with the name, the bound and what came."""
    if not holds:
        raise ValueError(f"`{name}` must be {bound}, got {value}.")
