"""PLE: shared experts and experts of a task's own, in one level or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import ModuleFactory, made
from lightning_flatmtl.models._gate import Gate, mixed, refuse_unclear_gate
from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks

__all__ = ["PLE"]


class _Computed(NamedTuple):
    """What the experts of a level have read and computed."""

    read: list[Any]
    """What each task's experts and gate read; a single entry if all read the same."""
    own: list[list[Tensor]]
    """Outputs of each task's experts."""
    common: list[Tensor]
    """Outputs of the shared experts."""


class PLE(nn.Module):
    r"""Progressive layered extraction: levels of customized gate control (Tang et al., 2020).

    In each level a task has experts of its own beside those that all tasks share, and a gate that
    weighs both; a shared gate weighs all experts. With the stem's outputs as :math:`z_k^0 = z^0`,
    level :math:`l` computes

    .. math::
        z_k^l = \sum_e g_k^l(z_k^{l-1})_e\, h_e, \quad h \in \{f_{k,i}^l(z_k^{l-1})\} \cup
        \{f_{s,i}^l(z^{l-1})\}; \qquad
        z^l = \sum_e g_s^l(z^{l-1})_e\, h_e, \quad h \text{ of all tasks and shared}

    (`doi:10.1145/3383313.3412236 <https://doi.org/10.1145/3383313.3412236>`_). The last level has
    no shared gate. With one level it is :class:`CGC`.

    Found from the graph: in the last level a task's experts belong to it, and in the last two its
    gate. All else is shared, a task's own experts of lower levels too, since the shared gate
    carries their outputs to all tasks.

    What comes back is a :class:`TaskFeatures`: what is shared runs once for all tasks, a task's own
    parts run in its own passes.

    Shapes:
        Inputs as the stem takes them, or, without one, as the experts of the first level do,
        tensors or mappings; to ``{task: [batch, ...]}``, as the last experts' outputs.

    Args:
        tasks: Names of the tasks.
        experts: For each level what makes an expert of it, each with initial weights of its own.
        shared_experts: Shared experts in each level, at least 1.
        task_experts: Experts of each task in each level, at least 1.
        gate_features: For each level the numbers that a linear gate reads of a sample, at least 1:
            what the experts of the level read, flattened. Needed without ``gate``.
        gate: Makes each gate, a module from what the experts of its level read to one logit for
            each of its experts: first the task's own, then the shared ones; the shared gate has
            those of all tasks, in their order, before the shared ones. Only with one level, whose
            gates are all of one size.
        stem: What comes before the first level, such as a
            :class:`~lightning_flatmtl.models.TableEmbedding`; ``None`` for nothing.

    Raises:
        ValueError: If an argument is out of its bounds; in ``forward`` if the outputs of experts or
            gates do not fit.
        TypeError: If a factory makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import PLE, MLPEncoder
        >>> experts = [lambda: MLPEncoder(8, widths=[16]), lambda: MLPEncoder(16, widths=[4])]
        >>> encoder = PLE(["a", "b"], experts, gate_features=[8, 16])
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        experts: Sequence[Callable[[], nn.Module]],
        shared_experts: int = 1,
        task_experts: int = 1,
        gate_features: Sequence[int] | None = None,
        gate: Callable[[], nn.Module] | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if len(experts) == 0:
            raise ValueError("`experts` must name at least one level, got none.")
        for name, count in [("shared_experts", shared_experts), ("task_experts", task_experts)]:
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        refuse_unclear_gate(gate_features, gate)
        if gate is not None and len(experts) > 1:
            raise ValueError(
                f"`gate` must be None with several levels, whose gates differ in size, got "
                f"{len(experts)} levels. Use `gate_features`."
            )
        if gate_features is not None and len(gate_features) != len(experts):
            raise ValueError(
                f"`gate_features` must have a number for each of the {len(experts)} levels, got "
                f"{list(gate_features)}."
            )
        sizes: Sequence[int | None] = [None] if gate_features is None else gate_features
        self.stem = nn.Identity() if stem is None else stem
        last = len(experts) - 1
        self.levels = nn.ModuleList(
            _Level(self.tasks, expert, shared_experts, task_experts, size, gate, level < last)
            for level, (expert, size) in enumerate(zip(experts, sizes, strict=True))
        )

    def forward(self, inputs: Any) -> TaskFeatures:
        """Features of every task, finished when they are asked for."""
        common, below = self.stem(inputs), None
        *lower, last = self._each()
        for number, level in enumerate(lower):
            read = [common] if below is None else lower[number - 1].of_tasks(below)
            below = level.run(read, common)
            common = level.common(common, below)
        return TaskFeatures(self, (common, last.of_all(common), below))

    def features(self, task: str, shared: tuple[Any, list[Tensor], _Computed | None]) -> Tensor:
        """What the experts and gates of one task make of what is shared.

        Args:
            task: Its name.
            shared: What the shared experts of the last level have read and computed, and the level
                below, if there is one.
        """
        common, outputs, below = shared
        last, own = self._each()[-1], self._last_read(task, common, below)
        return mixed(last.gates[task](own), [*last.of_task(task, own), *outputs])

    def _last_read(self, task: str, common: Any, below: _Computed | None) -> Any:
        return common if below is None else self._each()[-2].mixed(task, below)

    def _each(self) -> list[_Level]:
        return [level for level in self.levels if isinstance(level, _Level)]

    @torch.no_grad()
    def gate_weights(self, inputs: Any) -> dict[str, Tensor]:
        """How much of each expert of the last level every task takes, without a graph.

        Args:
            inputs: As for ``forward``.

        Returns:
            ``[batch, task_experts + shared_experts]`` by task, its own experts first.
        """
        common, _, below = self(inputs)._shared
        gates = self._each()[-1].gates
        return {task: gates[task](self._last_read(task, common, below)) for task in self.tasks}


class _Level(nn.Module):
    """Experts of every task and of all, with their gates."""

    def __init__(
        self,
        tasks: tuple[str, ...],
        expert: ModuleFactory,
        shared: int,
        own: int,
        features: int | None,
        gate: ModuleFactory | None,
        goes_on: bool,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.experts = nn.ModuleDict({task: _several(expert, own) for task in tasks})
        self.shared_experts = _several(expert, shared)
        self.gates = nn.ModuleDict({task: Gate(own + shared, features, gate) for task in tasks})
        every = len(tasks) * own + shared
        self.shared_gate = Gate(every, features, gate) if goes_on else None

    def run(self, read: list[Any], common: Any) -> _Computed:
        """Run all experts."""
        own = [self.of_task(task, _of(i, read)) for i, task in enumerate(self.tasks)]
        return _Computed(read, own, self.of_all(common))

    def of_task(self, task: str, read: Any) -> list[Tensor]:
        """The outputs of a task's experts."""
        experts = self.experts[task]
        assert isinstance(experts, nn.ModuleList)
        return [expert(read) for expert in experts]

    def of_all(self, read: Any) -> list[Tensor]:
        """The outputs of the shared experts."""
        return [expert(read) for expert in self.shared_experts]

    def of_tasks(self, computed: _Computed) -> list[Tensor]:
        """What the gates of all tasks make of their experts."""
        return [self.mixed(task, computed) for task in self.tasks]

    def mixed(self, task: str, computed: _Computed) -> Tensor:
        """What a task's gate makes of its own and the shared experts."""
        i = self.tasks.index(task)
        weights = self.gates[task](_of(i, computed.read))
        return mixed(weights, [*computed.own[i], *computed.common])

    def common(self, read: Any, computed: _Computed) -> Tensor:
        """What the shared gate makes of all experts."""
        assert self.shared_gate is not None
        every = [output for own in computed.own for output in own]
        return mixed(self.shared_gate(read), [*every, *computed.common])


def _of(task: int, read: list[Any]) -> Any:
    return read[0] if len(read) == 1 else read[task]


def _several(expert: ModuleFactory, count: int) -> nn.ModuleList:
    return nn.ModuleList(made("experts", expert) for _ in range(count))
