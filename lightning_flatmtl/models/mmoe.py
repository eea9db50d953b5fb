"""MMoE: experts for all tasks, and a gate for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import made
from lightning_flatmtl.models._gate import Gate, mixed, refuse_unclear_gate
from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks

__all__ = ["MMoE"]


class MMoE(nn.Module):
    r"""Multi-gate mixture of experts (Ma et al., 2018).

    .. math:: z = s(x), \qquad
        y_k = \sum_{e=1}^{n} g_k(z)_e\, f_e(z), \qquad g_k(z) = \mathrm{softmax}(W_k z)

    with the experts :math:`f_e`, modules of any kind, a shared stem :math:`s`, and a gate
    :math:`W_k` for each task
    (`doi:10.1145/3219819.3220007 <https://doi.org/10.1145/3219819.3220007>`_). Tasks that have
    little in common can take different experts, where one trunk would have to do for both.

    Shared are the stem and the experts; a task's own are its gate and its head. An expert that no
    gate chooses, whose weight is 0 for all samples, gets a gradient of 0, as the formula says;
    :meth:`gate_weights` shows it.

    What comes back is a :class:`TaskFeatures`: the experts run once for all tasks, a gate runs in
    its task's own passes.

    Shapes:
        Inputs as the stem takes them, or, without one, as the experts do, tensors or mappings; to
        ``{task: [batch, ...]}``, as the experts' outputs.

    Args:
        tasks: Names of the tasks.
        expert: Makes an expert, each with initial weights of its own.
        experts: How many there are, at least 2.
        gate_features: Numbers that a linear gate reads of a sample, at least 1: those of the stem's
            outputs, or of the inputs, flattened. Needed without ``gate``.
        gate: Makes the gate of a task, a module from what the experts read to one logit for each of
            them, ``[batch, experts]``.
        stem: What comes before experts and gates, such as a
            :class:`~lightning_flatmtl.models.TableEmbedding`; ``None`` for nothing.

    Raises:
        ValueError: If an argument is out of its bounds; in ``forward`` if the outputs of experts or
            gates do not fit.
        TypeError: If ``expert`` or ``gate`` makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MLPEncoder, MMoE
        >>> encoder = MMoE(["a", "b"], lambda: MLPEncoder(8, widths=[16, 4]), 3, gate_features=8)
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        expert: Callable[[], nn.Module],
        experts: int = 4,
        gate_features: int | None = None,
        gate: Callable[[], nn.Module] | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if experts < 2:
            raise ValueError(
                f"`experts` must be at least 2, got {experts}. A gate has nothing to choose from."
            )
        refuse_unclear_gate(gate_features, gate)
        self.stem = nn.Identity() if stem is None else stem
        self.experts = nn.ModuleList(made("expert", expert) for _ in range(experts))
        self.gates = nn.ModuleDict({t: Gate(experts, gate_features, gate) for t in self.tasks})

    def forward(self, inputs: Any) -> TaskFeatures:
        """Features of every task, mixed when they are asked for."""
        read = self.stem(inputs)
        return TaskFeatures(self, (read, [expert(read) for expert in self.experts]))

    def features(self, task: str, shared: tuple[Any, list[Tensor]]) -> Tensor:
        """What the gate of one task makes of the experts' outputs.

        Args:
            task: Its name.
            shared: What the gate reads, and the experts' outputs.
        """
        read, outputs = shared
        return mixed(self.gates[task](read), outputs)

    @torch.no_grad()
    def gate_weights(self, inputs: Any) -> dict[str, Tensor]:
        """How much of each expert every task takes, ``[batch, experts]``, without a graph.

        Args:
            inputs: As for ``forward``.
        """
        read = self.stem(inputs)
        return {task: self.gates[task](read) for task in self.tasks}
