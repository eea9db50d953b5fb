"""The one entrance of the engine's gradients into Lightning: a loss whose gradient they are."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor

__all__ = ["surrogate_loss"]


class _Surrogate(torch.autograd.Function):
    """Value: the loss. Gradient with respect to parameter i: the i-th given tensor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *params_and_gradients: Tensor) -> Tensor:
        """Keep the gradients for the backward pass and return the loss."""
        ctx.count = count
        ctx.parts = [_part_of(p) for p in params_and_gradients[:count]]
        ctx.save_for_backward(*params_and_gradients[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Any:
        """Multiply by the incoming gradient: loss scale and 1/accumulation arrive there."""
        (grad_output,) = grad_outputs
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        count, parts = ctx.count, ctx.parts  # type: ignore[attr-defined]
        scaled = [g * grad_output.to(g.dtype) for g in saved]
        gradients = [g if of is None else of(g) for g, of in zip(scaled, parts, strict=True)]
        return None, None, *gradients, *([None] * count)


def _part_of(param: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes this process's part of a gradient that of a sharded parameter."""
    if not isinstance(param, DTensor):
        return None
    return partial(
        DTensor.from_local,
        device_mesh=param.device_mesh,
        placements=param.placements,
        shape=param.shape,
        stride=param.stride(),
    )


def surrogate_loss(
    loss: Tensor, params: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """A scalar with the value of ``loss`` whose gradient is exactly ``gradients``.

    Its ``backward`` goes through everything that a loss's backward goes through: loss scaling,
    the division by accumulated batches, DDP's hooks, hooks on parameters.

    Args:
        loss: The value, a scalar; it is detached.
        params: The parameters.
        gradients: One tensor per parameter, of its shape (of a sharded parameter the part that lies
            here); ``None`` leaves that ``.grad`` alone.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> surrogate_loss(torch.tensor(3.0), [w], [torch.tensor([1.0, 2.0])]).backward()
        >>> w.grad
        tensor([1., 2.])
    """
    pairs = [(p, g.to(p.dtype)) for p, g in zip(params, gradients, strict=True) if g is not None]
    if not pairs:
        return loss.detach().clone().requires_grad_()
    params_, gradients_ = zip(*pairs, strict=True)
    surrogate: Tensor = _Surrogate.apply(loss.detach(), len(pairs), *params_, *gradients_)
    return surrogate
