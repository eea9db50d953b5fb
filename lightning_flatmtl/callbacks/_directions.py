"""Random directions in the space of the parameters, the same in every process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Displacement", "displaced", "filter_normalised", "on_sphere", "trainable"]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are moved."""
    return [p for p in module.parameters() if p.requires_grad]


def on_sphere(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A direction of norm one, uniformly distributed over the sphere of all parameters.

    Args:
        params: The parameters.
        generator: On the CPU, so that all processes draw the same.
    """
    drawn = _drawn(params, generator)
    norm = torch.stack([d.norm() for d in drawn]).norm()
    return [(d / norm).to(p) for d, p in zip(drawn, params, strict=True)]


def filter_normalised(
    params: Sequence[Tensor], generator: torch.Generator, vectors: bool
) -> list[Tensor]:
    """A direction in which every filter is as long as the filter that it moves.

    A filter is a slice along the first axis: the weights into one channel or neuron.

    Args:
        params: The parameters.
        generator: On the CPU, so that all processes draw the same.
        vectors: Whether parameters with one axis or none move, each as one filter.
    """
    pairs = zip(_drawn(params, generator), params, strict=True)
    return [_as_long(d, p.detach(), vectors).to(p) for d, p in pairs]


def _drawn(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    # Single precision whatever the model has, so that its precision does not change them.
    return [torch.randn(p.shape, generator=generator).double() for p in params]


def _as_long(drawn: Tensor, param: Tensor, vectors: bool) -> Tensor:
    if param.ndim < 2:
        if not vectors:
            return torch.zeros_like(drawn)
        drawn_rows, rows = drawn.reshape(1, -1), param.reshape(1, -1)
    else:
        drawn_rows, rows = drawn.flatten(1), param.flatten(1)
    scale = rows.cpu().double().norm(dim=1, keepdim=True) / drawn_rows.norm(dim=1, keepdim=True)
    long: Tensor = (drawn_rows * scale).reshape(drawn.shape)
    return long


class Displacement:
    """Moves parameters away from where they were.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = [p.detach() for p in params]
        self.origin = [p.clone() for p in self._params]

    def to(self, directions: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
        """Go to the origin plus the directions times their coefficients."""
        self.back()
        for direction, coefficient in zip(directions, coefficients, strict=True):
            if coefficient and self._params:
                torch._foreach_add_(self._params, list(direction), alpha=coefficient)

    def back(self) -> None:
        """Go to the origin, bit for bit."""
        if self._params:
            torch._foreach_copy_(self._params, self.origin)


@contextmanager
def displaced(params: Sequence[Tensor]) -> Iterator[Displacement]:
    """Run the block, in which parameters may be moved, then put them back."""
    with torch.no_grad():
        displacement = Displacement(params)
    try:
        yield displacement
    finally:
        with torch.no_grad():
            displacement.back()
