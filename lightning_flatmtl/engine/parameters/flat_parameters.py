"""A list of parameters as one flat vector: the columns of the task Jacobian."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["FlatParameters"]


class FlatParameters:
    """Where each parameter lies in a row of the task Jacobian.

    Rows are written and read as whole vectors, because on a large trunk the step's own cost is
    memory traffic: a concatenation into a row that exists already, views into it, nothing else.

    Args:
        params: The parameters in the order of the columns, all on one device.
        tensors: The parts of their values that lie here, where they are sharded.
        after_move: To be called when the values have changed.

    Example:
        >>> import torch
        >>> layout = FlatParameters(list(torch.nn.Linear(2, 3).parameters()))
        >>> layout.numel
        9
        >>> [tuple(v.shape) for v in layout.views(torch.arange(9.0))]
        [(3, 2), (3,)]
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        tensors: Sequence[Tensor] | None = None,
        after_move: Callable[[], None] | None = None,
    ) -> None:
        self.params: list[Tensor] = list(params)
        self.tensors = self.params if tensors is None else list(tensors)
        """Where their values lie; a part of each where parameters are sharded."""
        self._after_move = after_move
        self.sizes = [t.numel() for t in self.tensors]
        self.numel = sum(self.sizes)
        if any(p.is_complex() for p in self.params):
            raise ValueError(
                "Task gradients of complex parameters are not supported, got parameters of type "
                f"{next(p.dtype for p in self.params if p.is_complex())}. Keep real and imaginary "
                "part as two real parameters."
            )
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ValueError(
                "The trainable parameters must be on one device, got "
                f"{sorted(str(d) for d in devices)}. Move the module to one device; models spread "
                "over several devices are not supported."
            )

    @property
    def device(self) -> torch.device:
        """The device of the parameters (the CPU when there are none)."""
        return self.params[0].device if self.params else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of a row: that of the parameters, but at least 32 bits."""
        dtype = torch.float32
        for p in self.params:
            dtype = torch.promote_types(dtype, p.dtype)
        return dtype

    def same_as(self, other: "FlatParameters") -> bool:
        """Whether ``other`` has the same parameters in the same order."""
        pairs = zip(self.params, other.params, strict=False)
        return len(self.params) == len(other.params) and all(a is b for a, b in pairs)

    def views(self, row: Tensor) -> list[Tensor]:
        """Cut a vector of ``numel`` entries into views of the parameters' shapes."""
        pieces = torch.split(row, self.sizes) if self.params else ()
        return [piece.view(t.shape) for piece, t in zip(pieces, self.tensors, strict=True)]

    @torch.no_grad()
    def write(self, gradients: Sequence[Tensor | None], row: Tensor) -> None:
        """Write one gradient per parameter into ``row``; ``None`` (not reached) is zero."""
        if not self.params:
            return
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise ValueError(
                "Task gradients must be dense, got a sparse one. Use `sparse=False` in "
                "nn.Embedding."
            )
        if all(g is not None and g.dtype == row.dtype for g in gradients):
            torch.cat([g.reshape(-1) for g in gradients if g is not None], out=row)
            return
        for view, gradient in zip(self.views(row), gradients, strict=True):
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient)

    @torch.no_grad()
    def write_difference(
        self, gradients: Sequence[Tensor | None], base: Tensor, row: Tensor
    ) -> None:
        """Write ``gradients - base`` into ``row`` in one pass over the memory."""
        views = zip(self.views(row), gradients, self.views(base), strict=True)
        for view, gradient, start in views:
            if gradient is None:
                torch.neg(start, out=view)
            else:
                torch.sub(gradient, start, out=view)

    def flatten(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """One gradient per parameter as a new vector."""
        row = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        self.write(gradients, row)
        return row

    def zeros(self) -> Tensor:
        """A new vector of zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def values(self) -> Tensor:
        """The parameters' values as a new vector."""
        return self.flatten([t.detach() for t in self.tensors])

    @torch.no_grad()
    def save(self, out: Tensor) -> Tensor:
        """Copy the parameters' values into the vector ``out`` and return it."""
        self.write([t.detach() for t in self.tensors], out)
        return out

    @torch.no_grad()
    def restore(self, saved: Tensor) -> None:
        """Put the values of :meth:`save` back, bit for bit."""
        if self.params:
            torch._foreach_copy_(self.tensors, self.views(saved))
        if self._after_move is not None:
            self._after_move()

    @torch.no_grad()
    def add(self, row: Tensor, factor: float, scale: Tensor | None = None) -> None:
        """Move the parameters by ``factor * scale * row``, in place."""
        if not self.params or factor == 0.0:
            return
        # In the precision of the row: 16 bits may hold neither its entries nor the factor.
        if scale is None:
            torch._foreach_add_(self.tensors, self.views(row), alpha=factor)
        else:
            torch._foreach_addcmul_(self.tensors, self.views(scale), self.views(row), factor)
        if self._after_move is not None:
            self._after_move()
