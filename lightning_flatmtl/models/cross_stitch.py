"""Cross-stitch networks: a column of layers for each task, mixed between the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import made
from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks

__all__ = ["CrossStitch"]


class CrossStitch(nn.Module):
    r"""Cross-stitch units between the networks of the tasks (Misra et al., 2016).

    Each task has a column of the same stages. Between two stages a unit mixes the activations of
    all columns:

    .. math:: \tilde x_k = \sum_{j=1}^{m} \alpha_{kj} \odot x_j

    with learned :math:`\alpha`, one for each channel or one for all
    (`arXiv:1604.03539 <https://arxiv.org/abs/1604.03539>`_). It begins near the identity:
    :math:`\alpha_{kk}` is ``own``, the other :math:`\alpha_{kj}` share what is left of 1.

    Found from the graph: a column's last stage and its row of the last unit belong to the task. All
    else is shared, since later units carry it to all tasks.

    What comes back is a :class:`TaskFeatures`: a column's last stage runs in its task's own passes.

    Shapes:
        Inputs as the first stage takes them, tensors or mappings; to ``{task: [batch, ...]}``, as
        the last stage's outputs. What is mixed are tensors ``[batch, channels, ...]``.

    Args:
        tasks: Names of the tasks.
        stages: For each stage what makes it, for every column anew; at least two.
        channels: For each unit, one less than stages, the channels that it mixes one by one;
            ``None`` for one weight for all.
        own: What a task begins with of its own activations, in [0, 1].

    Raises:
        ValueError: If an argument is out of its bounds; in ``forward`` if the activations do not
            fit.
        TypeError: If a stage makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import CrossStitch, MLPEncoder
        >>> stages = [lambda: MLPEncoder(8, widths=[16]), lambda: MLPEncoder(16, widths=[4])]
        >>> encoder = CrossStitch(["a", "b"], stages, channels=[16])
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        stages: Sequence[Callable[[], nn.Module]],
        channels: Sequence[int] | None = None,
        own: float = 0.9,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if len(stages) < 2:
            raise ValueError(
                f"`stages` must be at least 2, since units are between them, got {len(stages)}."
            )
        if not 0 <= own <= 1:
            raise ValueError(f"`own` must be in [0, 1], got {own}.")
        units = len(stages) - 1
        sizes = [1] * units if channels is None else list(channels)
        if len(sizes) != units or min(sizes) < 1:
            raise ValueError(
                f"`channels` must be {units} numbers of at least 1, one for each unit between two "
                f"of the {len(stages)} stages, got {sizes}."
            )
        self.columns = nn.ModuleDict(
            {task: nn.ModuleList(made("stages", stage) for stage in stages) for task in self.tasks}
        )
        # A row of a unit is a parameter of its own, so that it can belong to its task.
        self.units = nn.ModuleList(
            nn.ParameterDict({task: _row(self.tasks, task, size, own) for task in self.tasks})
            for size in sizes
        )

    def forward(self, inputs: Any) -> TaskFeatures:
        """Features of every task; the last unit and stage are run when they are asked for."""
        outputs = [self._stage(task, 0)(inputs) for task in self.tasks]
        for level in range(1, len(self.units)):
            outputs = [
                self._stage(task, level)(self._mixed(task, level - 1, outputs))
                for task in self.tasks
            ]
        return TaskFeatures(self, outputs)

    def features(self, task: str, shared: list[Tensor]) -> Tensor:
        """What the last unit and stage of one task make of the columns' activations.

        Args:
            task: Its name.
            shared: The activations of all columns before the last unit.
        """
        last = len(self.units)
        found: Tensor = self._stage(task, last)(self._mixed(task, last - 1, shared))
        return found

    def _stage(self, task: str, level: int) -> nn.Module:
        column = self.columns[task]
        assert isinstance(column, nn.ModuleList)
        return column[level]

    def _mixed(self, task: str, unit: int, outputs: Sequence[Tensor]) -> Tensor:
        rows = self.units[unit]
        assert isinstance(rows, nn.ParameterDict)
        row = rows[task]
        x, channels = outputs[0], row.shape[1]
        if not isinstance(x, Tensor) or x.ndim < 2 or (channels > 1 and x.shape[1] != channels):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"Stage {unit} must have outputs [batch, channels, ...], as `channels` says with "
                f"{channels if channels > 1 else 'any number'} of them, got {got}."
            )
        stacked = torch.stack(list(outputs), 1)
        mixed: Tensor = (row.reshape(1, *row.shape, *[1] * (x.ndim - 2)) * stacked).sum(1)
        return mixed


def _row(tasks: Sequence[str], task: str, channels: int, own: float) -> nn.Parameter:
    """What a task begins with of each column, ``[tasks, channels]``; all of its own if alone."""
    others = len(tasks) - 1
    weights = [own if other == task else (1 - own) / others for other in tasks] if others else [1.0]
    return nn.Parameter(torch.tensor(weights)[:, None].repeat(1, channels))
