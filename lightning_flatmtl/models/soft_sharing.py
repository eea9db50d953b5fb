"""Soft parameter sharing: a trunk for each task, held together by a penalty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import made
from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks

__all__ = ["SoftSharing"]


class SoftSharing(nn.Module):
    r"""A trunk for each task, and a penalty on how far their weights are apart.

    Of the stacked weights :math:`W \in \mathbb R^{m \times d}` of every layer's parameter, a row
    for each task, the penalty is ``weight`` times the sum over the parameters of

    - ``"l2"``: :math:`\sum_k \lVert w_k - \bar w \rVert^2`, with the mean :math:`\bar w` of the
      rows; that is :math:`\tfrac 1m \sum_{i<j} \lVert w_i - w_j \rVert^2`
      (Duong et al., 2015, `doi:10.3115/v1/P15-2139 <https://doi.org/10.3115/v1/P15-2139>`_, for two
      tasks);
    - ``"trace"``: :math:`\lVert W \rVert_* = \sum_i \sigma_i(W)`, the trace norm, which prefers
      rows that are multiples of each other (Yang & Hospedales, 2017, `arXiv:1606.04038
      <https://arxiv.org/abs/1606.04038>`_, the flattening by tasks). It draws the weights to 0,
      too. Where a singular value is 0 its share of the gradient is 0, the smallest subgradient.

    :class:`~lightning_flatmtl.MultiTaskModule` asks its encoder for :meth:`penalty` and adds its
    gradient to the step: not aggregated, not perturbed, and logged as ``train/penalty``. So each
    trunk is reached by its own task's loss alone, and **no parameter is shared by the losses**: an
    aggregator of gradients has nothing to aggregate, and a TaskSAM perturbs each trunk as its
    task's own.

    Shapes:
        Inputs as the trunk takes them, tensors or mappings; to ``{task: [batch, ...]}``.

    Args:
        tasks: Names of the tasks.
        trunk: Makes the trunk of a task, each with initial weights of its own.
        weight: Of the penalty, in [0, inf).
        distance: ``"l2"`` or ``"trace"``.

    Raises:
        ValueError: If an argument is out of its bounds, or the trunks differ in their parameters.
        TypeError: If ``trunk`` makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MLPEncoder, SoftSharing
        >>> encoder = SoftSharing(["a", "b"], lambda: MLPEncoder(8, widths=[16, 4]), weight=0.01)
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
        >>> encoder.penalty().requires_grad
        True
    """

    def __init__(
        self,
        tasks: Sequence[str],
        trunk: Callable[[], nn.Module],
        weight: float = 1e-3,
        distance: Literal["l2", "trace"] = "l2",
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if not 0 <= weight < math.inf:
            raise ValueError(f"`weight` must be in [0, inf), got {weight}.")
        if distance not in {"l2", "trace"}:
            raise ValueError(f"`distance` must be 'l2' or 'trace', got {distance!r}.")
        self.weight, self.distance = weight, distance
        self.trunks = nn.ModuleDict({task: made("trunk", trunk) for task in self.tasks})
        first, *others = ([(n, p.shape) for n, p in t.named_parameters()] for t in self._each())
        if any(other != first for other in others):
            raise ValueError("`trunk` must make trunks with the same parameters, got others.")

    def forward(self, inputs: Any) -> TaskFeatures:
        """Features of every task, computed when they are asked for."""
        return TaskFeatures(self, inputs)

    def features(self, task: str, shared: Any) -> Tensor:
        """What the trunk of one task makes of the inputs.

        Args:
            task: Its name.
            shared: The inputs.
        """
        found: Tensor = self.trunks[task](shared)
        return found

    def penalty(self) -> Tensor | None:
        """The penalty on all weights that are trained; ``None`` with one task or weight 0."""
        if len(self.tasks) == 1 or self.weight == 0:
            return None
        of = _squared if self.distance == "l2" else _trace_norm
        layers = zip(*(trunk.parameters() for trunk in self._each()), strict=True)
        terms = [
            of(torch.stack([w.flatten() for w in layer]))
            for layer in layers
            if any(w.requires_grad for w in layer)
        ]
        return self.weight * torch.stack(terms).sum() if terms else None

    def _each(self) -> list[nn.Module]:
        return [self.trunks[task] for task in self.tasks]


def _squared(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)).square().sum()


def _trace_norm(rows: Tensor) -> Tensor:
    if rows.dtype not in {torch.float32, torch.float64}:
        rows = rows.float()  # there are no singular values in half precision
    values = torch.linalg.svdvals(rows)
    zero = values.detach().max() * max(rows.shape) * torch.finfo(rows.dtype).eps
    # The vectors of what is 0 but for rounding are arbitrary: they get no gradient.
    return torch.where(values > zero, values, torch.zeros_like(values)).sum()
