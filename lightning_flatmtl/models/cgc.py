"""CGC: shared experts and experts of a task's own, with a gate for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_flatmtl.models.ple import PLE

__all__ = ["CGC"]


class CGC(PLE):
    r"""Customized gate control (Tang et al., 2020).

    .. math:: z = s(x), \qquad
        y_k = \sum_e g_k(z)_e\, h_e, \quad h \in \{f_{k,i}(z)\} \cup \{f_{s,i}(z)\}, \qquad
        g_k(z) = \mathrm{softmax}(W_k z)

    with the experts :math:`f_k` of task :math:`k`, the shared experts :math:`f_s` and a shared stem
    :math:`s` (`doi:10.1145/3383313.3412236 <https://doi.org/10.1145/3383313.3412236>`_). What a
    task has alone, no other task disturbs, which is what :class:`MMoE` cannot promise. :class:`PLE`
    has several such levels.

    Shared are the stem and the shared experts; a task's own are its experts, its gate and its head.

    Shapes:
        Inputs as the stem takes them, or, without one, as the experts do, tensors or mappings; to
        ``{task: [batch, ...]}``, as the experts' outputs.

    Args:
        tasks: Names of the tasks.
        expert: Makes an expert, each with initial weights of its own.
        shared_experts: Shared experts, at least 1.
        task_experts: Experts of each task, at least 1.
        gate_features: Numbers that a linear gate reads of a sample, at least 1: those of the stem's
            outputs, or of the inputs, flattened. Needed without ``gate``.
        gate: Makes the gate of a task, a module from what the experts read to one logit for each of
            them, ``[batch, task_experts + shared_experts]``, its own first.
        stem: What comes before experts and gates, such as a
            :class:`~lightning_flatmtl.models.TableEmbedding`; ``None`` for nothing.

    Raises:
        ValueError: If an argument is out of its bounds; in ``forward`` if the outputs of experts or
            gates do not fit.
        TypeError: If ``expert`` or ``gate`` makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import CGC, MLPEncoder
        >>> encoder = CGC(["a", "b"], lambda: MLPEncoder(8, widths=[16, 4]), gate_features=8)
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        expert: Callable[[], nn.Module],
        shared_experts: int = 1,
        task_experts: int = 1,
        gate_features: int | None = None,
        gate: Callable[[], nn.Module] | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        sizes = None if gate_features is None else [gate_features]
        super().__init__(tasks, [expert], shared_experts, task_experts, sizes, gate, stem)
