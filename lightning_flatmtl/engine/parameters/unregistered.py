"""Parameters that the optimizer trains and the module does not know."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_flatmtl.engine.processes.base import Processes

__all__ = ["with_unregistered"]


def with_unregistered(
    named: Mapping[str, nn.Parameter],
    optimized: Iterable[Tensor],
    module: nn.Module,
    processes: Processes,
) -> dict[str, nn.Parameter]:
    """All parameters by name, those in the optimizer that lie in a plain dict or list too.

    The unknowns of an inverse problem are kept like that.

    Args:
        named: The parameters of the module.
        optimized: What the optimizer trains.
        module: The module.
        processes: Those that share the step.

    Raises:
        ValueError: If there are such parameters and several processes: nobody sums up their
            gradients.
    """
    known = set(map(id, named.values()))
    others = {id(p): p for p in optimized if id(p) not in known and p.requires_grad}
    if not others:
        return dict(named)
    if processes.size > 1:
        raise ValueError(
            "With several processes the optimizer must train parameters of the module only, got "
            f"{len(others)} that it does not know: {_described(list(others.values()), module)}. "
            "The processes do not bring their gradients together: make each an attribute of its "
            "own (`self.x = nn.Parameter(...)`) or keep them in a `nn.ParameterDict`."
        )
    found = {f"optimizer.{i}": cast(nn.Parameter, p) for i, p in enumerate(others.values())}
    return {**named, **found}


def _described(params: Sequence[Tensor], module: nn.Module) -> str:
    names = {
        id(tensor): name
        for of_module, part in module.named_modules()
        for attribute, value in vars(part).items()
        if not attribute.startswith("_")
        for name, tensor in _tensors(".".join(filter(None, [of_module, attribute])), value)
    }
    parts = [f"{names.get(id(p), 'one')} of shape {list(p.shape)}" for p in params[:5]]
    return ", ".join(parts + ["..."] * (len(params) > 5))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
