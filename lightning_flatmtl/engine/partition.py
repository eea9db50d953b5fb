"""Which parameters are shared and which belong to one task's head, read off the graph."""

from collections.abc import Iterable, KeysView, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

__all__ = ["Partition", "reached_parameters"]

_COMPILED = "CompiledFunctionBackward"
_CHECKPOINT = "CheckpointFunctionBackward"
"""The node of a reentrant checkpoint, which hides the parameters behind it."""
_LEAF = "AccumulateGrad"
_SHARED = None
"""The owner of what several tasks share; the others are owned by a task's name."""


class Partition:
    """Shared and head parameters, found from the graph of the losses or declared.

    A parameter that two or more losses reach is shared; one that a single loss reaches belongs to
    that task's head. The finding is sticky: a task that is absent from a batch keeps what it
    reached before. Parameters are told apart by identity, so tied weights count once.

    Args:
        shared: Parameters declared shared; they are not looked for in the graph.
        heads: Parameters declared to belong to a task, by task name.

    Raises:
        ValueError: If a parameter is declared twice.

    Example:
        >>> import torch
        >>> w, a, b = (torch.nn.Parameter(torch.ones(())) for _ in range(3))
        >>> partition = Partition()
        >>> partition.observe({"a": w * a, "b": w * b})
        >>> partition.shared([w, a, b]) == [w], partition.head("a", [w, a, b]) == [a]
        (True, True)
    """

    def __init__(
        self,
        shared: Iterable[nn.Parameter] | None = None,
        heads: Mapping[str, Iterable[nn.Parameter]] | None = None,
    ) -> None:
        self._owner: dict[nn.Parameter, str | None] = {}
        self._declared: set[nn.Parameter] = set()
        self._behind_compiled: set[nn.Parameter] = set()
        self._seen: dict[str, None] = {}
        self.needs_backward = False
        self.compiled = False
        """Whether a graph was compiled, so that it may be walked once only."""
        """Whether a graph hid parameters, so that not all that are reached are known."""
        self.penalised: set[Any] = set()
        """Parameters that a penalty, which belongs to no task, has reached."""
        self.changes = 0
        """How often something new has been found."""
        self.declare(shared, heads)

    def declare(
        self,
        shared: Iterable[nn.Parameter] | None,
        heads: Mapping[str, Iterable[nn.Parameter]] | None,
    ) -> None:
        """Declare parameters; see the class."""
        for owner, params in [(_SHARED, shared or ()), *(heads or {}).items()]:
            for p in params:
                if p in self._declared and self._owner[p] != owner:
                    raise ValueError(
                        f"A parameter of shape {list(p.shape)} is declared for "
                        f"{self._label(self._owner[p])} and for {self._label(owner)}; declare each "
                        "parameter once, those of several tasks as shared."
                    )
                self._owner[p] = owner
                self._declared.add(p)

    def copy(self) -> "Partition":
        """Another one that has found the same, for who looks further by himself."""
        other = Partition()
        for name, value in vars(self).items():
            setattr(other, name, value.copy() if isinstance(value, dict | set) else value)
        return other

    @staticmethod
    def _label(owner: str | None) -> str:
        return "the shared part" if owner is _SHARED else f"task '{owner}'"

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Walk the graphs of the losses and note who reaches which parameter.

        Every node is entered at most twice, however many tasks there are: once by the first task
        that finds it, once more to mark everything below it as shared.
        """
        visitor: dict[Node, str | None] = {}
        outputs: dict[Node, int] = {}
        for task, loss in losses.items():
            self._see(task)
            stack = [(loss.grad_fn, loss.output_nr)] if loss.grad_fn is not None else []
            while stack:
                node, output = stack.pop()
                kind = type(node).__name__
                if kind.startswith(_COMPILED) and outputs.setdefault(node, output) != output:
                    self._note_behind_compiled(node)
                self.compiled = self.compiled or kind.startswith(_COMPILED)
                if visitor.get(node, "") in (task, _SHARED):
                    continue
                if kind == _CHECKPOINT and not self.needs_backward:
                    self.needs_backward = True
                    self.changes += 1
                visitor[node] = _SHARED if node in visitor else task
                if kind == _LEAF:
                    self._note(node.variable, task)  # type: ignore[attr-defined]
                stack.extend((child, nr) for child, nr in node.next_functions if child is not None)

    @property
    def hidden(self) -> bool:
        """Whether a graph cannot be walked again without ado."""
        return self.compiled or self.needs_backward

    @property
    def seen(self) -> KeysView[str]:
        """Tasks whose loss has been observed, in the order of their appearance."""
        return self._seen.keys()

    def _see(self, task: str) -> None:
        if task not in self._seen:
            self._seen[task] = None
            self.changes += 1

    def note(self, task: str, params: Iterable[nn.Parameter]) -> None:
        """Note that the loss of ``task`` reaches ``params``, where the graph does not show it."""
        self._see(task)
        for p in params:
            self._note(p, task)

    def share(self, params: Iterable[nn.Parameter]) -> None:
        """Note parameters of which it is known that all tasks reach them, seen or not yet."""
        for p in params:
            if p not in self._declared and self._owner.get(p, "") is not _SHARED:
                self._owner[p] = _SHARED
                self.changes += 1

    def penalise(self, leaves: Iterable[Tensor]) -> None:
        """Note what a penalty reaches; it says nothing about who shares it."""
        new = set(leaves) - self.penalised
        if new:
            self.penalised |= new
            self.changes += 1

    def refuse_compiled(self) -> None:
        """Refuse a graph that does not show what is shared.

        Raises:
            ValueError: If a compiled module with several outputs holds undeclared parameters: its
                graph is a single node, below which everything looks shared.
        """
        if self._behind_compiled:
            raise ValueError(
                "The graph of a compiled module with several outputs does not show which "
                f"parameters are shared, got {len(self._behind_compiled)} that are not declared. "
                "Override `shared_parameters` and `task_parameters`, or compile encoder and heads "
                "each by themselves."
            )

    def _note_behind_compiled(self, node: Node) -> None:
        for child, _ in node.next_functions:
            if child is not None and _is_leaf(child):
                self._behind_compiled.add(child.variable)  # type: ignore[attr-defined]
        self._behind_compiled -= self._declared

    def _note(self, param: nn.Parameter, task: str) -> None:
        if param in self._declared:
            return
        known = self._owner.get(param, "")
        if known == "" or known not in (task, _SHARED):
            self._owner[param] = task if known == "" else _SHARED
            self.changes += 1

    def shared(self, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those of ``params`` that are shared, in their order."""
        return [p for p in params if self._owner.get(p, "") is _SHARED]

    def head(self, task: str, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those of ``params`` that belong to ``task`` alone, in their order."""
        return [p for p in params if self._owner.get(p) == task]

    def heads(
        self, tasks: Iterable[str], params: Sequence[nn.Parameter]
    ) -> dict[str, list[nn.Parameter]]:
        """:meth:`head` of every task, in one walk: tasks times parameters is much of both."""
        heads: dict[str, list[nn.Parameter]] = {task: [] for task in tasks}
        for p in params:
            owner = self._owner.get(p, _SHARED)
            if owner in heads and owner is not _SHARED:
                heads[owner].append(p)
        return heads

    def untouched(self, params: Sequence[nn.Parameter], tasks: Iterable[str]) -> list[nn.Parameter]:
        """Those of ``params`` that losses of ``tasks`` do not reach: other heads, spare ones."""
        present = {_SHARED, *tasks}
        return [p for p in params if self._owner.get(p, "") not in present]

    def state_dict(self, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """What has been found, by parameter name."""
        owners = {name: self._owner[p] for name, p in named.items() if p in self._owner}
        state = {"owners": owners, "seen": list(self._seen)}
        penalised = [name for name, p in named.items() if p in self.penalised]
        return {**state, "penalised": penalised} if penalised else state

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
        """Continue from :meth:`state_dict`; what is declared stays as declared."""
        for name, owner in state["owners"].items():
            if name in named and named[name] not in self._declared:
                self._owner[named[name]] = owner
        self._seen.update(dict.fromkeys(state["seen"]))
        self.penalised.update(named[name] for name in state.get("penalised", ()) if name in named)
        self.changes += 1

    def merge(self, states: Sequence[Mapping[str, Any]], named: Mapping[str, nn.Parameter]) -> None:
        """Continue from what several processes have found, each by :meth:`state_dict`.

        What is a head's in one process and another task's or shared in another is shared.
        """
        found: dict[str, set[str | None]] = {}
        for state in states:
            for name, owner in state["owners"].items():
                found.setdefault(name, set()).add(owner)
        owners = {
            name: next(iter(those)) if len(those) == 1 else _SHARED for name, those in found.items()
        }
        seen = list(dict.fromkeys(task for state in states for task in state["seen"]))
        self._seen.clear()  # the order is that of all
        penalised = {name for state in states for name in state.get("penalised", ())}
        self.load_state_dict({"owners": owners, "seen": seen, "penalised": penalised}, named)

    def unreached(self, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those of ``params`` that no loss and no penalty has reached so far."""
        return [p for p in params if p not in self._owner and p not in self.penalised]


def _is_leaf(node: Node) -> bool:
    return type(node).__name__ == _LEAF  # `node.name()` makes a string each time


def reached_parameters(outputs: Iterable[Tensor]) -> set[Tensor]:
    """All leaves that the graphs of ``outputs`` reach."""
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    nodes: set[Node] = set()
    leaves: set[Tensor] = set()
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if _is_leaf(node):
            leaves.add(node.variable)  # type: ignore[attr-defined]
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return leaves
