"""Module calls of the clean pass, answered again where only a head has moved."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_flatmtl.engine.hygiene import RandomTape, is_batch_norm
from lightning_flatmtl.engine.partition import reached_parameters

__all__ = ["CallMemo"]


@dataclass(frozen=True)
class _Call:
    """One call: what went in, what came out (detached), how often both had been changed then."""

    inputs: list[Any]
    form: Any
    output: Any
    leaves: set[Tensor]
    versions: list[int]
    mark: tuple[str, int, int]

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.inputs, *pytree.tree_leaves(self.output)) if _is_versioned(t)]

    def answers(self, args: Any, kwargs: Any, twins: set[int]) -> bool:
        """Whether the call is the recorded one, and nothing has been changed in place since."""
        given, form = pytree.tree_flatten((args, kwargs))
        if form != self.form or self.versions != [t._version for t in self.tensors()]:
            return False
        return all(_same(a, b, twins) for a, b in zip(given, self.inputs, strict=True))


class CallMemo:
    """What the modules of a model answered in the clean pass.

    With one head perturbed, a module that holds none of its parameters, called with the same inputs
    under the same random numbers, answers what it answered before: the trunk and the other heads
    need not run again. Inputs are the same if they are the same tensors, or equal ones on a CPU (on
    an accelerator comparing would wait for it). The module runs after all if an input has a graph
    of its own (of the perturbed head, or of what the model differentiates itself), if the answer
    depends on the head in a way that the module tree does not show, if something was changed in
    place, or if the call has moved a buffer that others may read. Modules with hooks inside run
    too, and nothing is answered where the clean pass itself has differentiated something.

    Args:
        module: The model; it is never answered for itself.
        tape: Knows how the random streams stood after each call.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> memo = CallMemo(net, RandomTape(torch.device("cpu")))
        >>> x, head = torch.ones(1, 2), list(net[1].parameters())
        >>> with memo.recording([head]):
        ...     clean = net(x)
        >>> with torch.no_grad():
        ...     _ = head[1].add_(1.0)  # moves the head
        >>> with memo.serving(head):  # the first layer is not run again
        ...     bool(torch.allclose(net(x), clean + 1.0))
        True
    """

    def __init__(self, module: nn.Module, tape: RandomTape) -> None:
        self._module = module
        self._tape = tape
        # By id: some modules (metrics) have a hash that changes with their state.
        self._calls: dict[int, list[_Call | None]] = {}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._differentiated = False

    @contextmanager
    def recording(self, heads: Iterable[Sequence[Tensor]]) -> Iterator[None]:
        """Note the calls of every module that holds no parameter of one of the ``heads``."""
        # A task without a head of its own is never run beside the others.
        heads = [head for head in heads if head]
        modules = {id(m): m for head in heads for m in _without(self._module, set(head))}
        with ExitStack() as stack:
            for module in modules.values():
                self._calls[id(module)] = []
                stack.enter_context(_forward_by(module, self._noting(module, stack)))
            yield

    @contextmanager
    def serving(self, head: Collection[Tensor]) -> Iterator[None]:
        """Answer from memory wherever no parameter of ``head`` is involved."""
        with ExitStack() as stack:
            moved = set(head)
            usable = bool(self._calls) and not self._differentiated
            twins = {id(twin) for _, twin in self._twins.values()}
            for module in _without(self._module, moved) if usable else ():
                if self._calls.get(id(module)):
                    answer = self._answer(module, moved, twins)
                    stack.enter_context(_forward_by(module, answer))
            yield

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._calls.clear()
        self._twins.clear()
        self._differentiated = False

    def _noting(self, module: nn.Module, stack: ExitStack) -> Callable[..., Any]:
        calls = self._calls[id(module)]
        run = module.forward

        def note(*args: Any, **kwargs: Any) -> Any:
            before = _moving_buffers(module)
            output = run(*args, **kwargs)
            if before != _moving_buffers(module) or _has_subclasses(output):
                calls.append(None)
                return output
            inputs, form = pytree.tree_flatten((args, kwargs))
            # What another recorded module has answered will come as its detached twin.
            inputs = [self._twins[id(i)][1] if id(i) in self._twins else i for i in inputs]
            detached = pytree.tree_map_only(Tensor, self._twin, output)
            outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            leaves = reached_parameters(outputs)
            for tensor in outputs:
                if tensor.requires_grad:
                    handle = tensor.register_hook(self._notice)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            mark = ("memo", id(module), len(calls))
            call = _Call(inputs, form, detached, leaves, [], mark)
            call.versions.extend(t._version for t in call.tensors())
            self._tape.mark(call.mark)
            calls.append(call)
            return output

        return note

    def _notice(self, gradient: Tensor) -> None:
        """The model differentiates within the clean pass, through what an answer would cut."""
        self._differentiated = True

    def _twin(self, tensor: Tensor) -> Tensor:
        # The tensor is kept beside its twin, so that its id stays its own.
        if id(tensor) not in self._twins:
            # Also a twin can be differentiated, as by a penalty on gradients at the features.
            twin = tensor.detach()
            differentiable = tensor.requires_grad and not tensor.is_inference()
            self._twins[id(tensor)] = tensor, twin.requires_grad_(differentiable)
        return self._twins[id(tensor)][1]

    def _answer(self, module: nn.Module, moved: set[Tensor], twins: set[int]) -> Callable[..., Any]:
        remaining = iter(self._calls[id(module)])
        run = module.forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = next(remaining, None)
            hidden = call is not None and not call.leaves.isdisjoint(moved)
            if call is None or hidden or not call.answers(args, kwargs, twins):
                return run(*args, **kwargs)
            self._tape.rewind(call.mark)
            return call.output

        return answer


def _without(module: nn.Module, params: set[Tensor]) -> Iterator[nn.Module]:
    """The largest parts of ``module`` that hold none of ``params``."""
    for child in module.children():
        if _is_compiled(child):
            continue  # it would be compiled once more
        if params.isdisjoint(child.parameters()):
            inside = (part for part in child.modules() if part is not child)
            if not any(_is_compiled(part) or _has_hooks(part) for part in inside):
                yield child
        else:
            yield from _without(child, params)


def _is_compiled(module: nn.Module) -> bool:
    return (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _moving_buffers(module: nn.Module) -> list[tuple[int, int]]:
    """Which buffers there are and how often each was changed; running statistics do not count.

    Nobody but their own layer reads those, and not in training.
    """
    return [
        (id(buffer), buffer._version)
        for layer in module.modules()
        if not is_batch_norm(layer)
        for buffer in layer._buffers.values()
        if buffer is not None and not buffer.is_inference()
    ]


@contextmanager
def _forward_by(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _has_subclasses(output: Any) -> bool:
    """Whether a tensor of ``output`` is of a kind of its own, which a twin would not be."""
    return any(
        isinstance(leaf, Tensor) and type(leaf) not in (Tensor, nn.Parameter)
        for leaf in pytree.tree_leaves(output)
    )


def _is_versioned(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _same(a: Any, b: Any, twins: set[int]) -> bool:
    if isinstance(a, Tensor) and a.requires_grad and id(a) not in twins:
        return False
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if type(a) is not Tensor or type(b) is not Tensor:
            return False  # it may carry more than values
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and a.device.type == "cpu" and torch.equal(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False
