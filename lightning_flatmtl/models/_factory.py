"""Modules that are made several times, each with initial weights of its own."""

from collections.abc import Callable

from torch import nn

__all__ = ["ModuleFactory", "made"]

ModuleFactory = Callable[[], nn.Module]
"""Makes a module; in a YAML file its ``class_path`` and ``init_args``."""


def made(name: str, factory: ModuleFactory) -> nn.Module:
    """A new module of a factory.

    Args:
        name: Of the argument, for messages.
        factory: What makes the module.

    Raises:
        TypeError: If it is a module itself, or makes something else.
    """
    advice = f"Pass a function that makes one, such as `{name}=lambda: MLPEncoder(8)`."
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"`{name}` must make a new module at each call, got a {type(factory).__name__}. "
            f"{advice}"
        )
    module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{name}` must make an nn.Module, got {module!r}. {advice}")
    return module
