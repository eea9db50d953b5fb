"""Attention between tasks: each looks at the features of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import made
from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks

__all__ = ["TaskAttention"]


class _Seen(NamedTuple):
    """What the tasks see of each other, ``[batch, tasks, features]`` each."""

    features: Tensor
    keys: Tensor
    values: Tensor


class TaskAttention(nn.Module):
    r"""Each task extracts its features from a shared trunk and attends to those of all tasks.

    With the trunk :math:`t`, an extractor :math:`e_k` for each task and :math:`h` attention heads
    of :math:`d_h` features, for each sample

    .. math::
        z_k = e_k(t(x)), \qquad
        a_k = \operatorname{softmax}_j \frac{(Q_k z_k)^\top (K z_j)}{\sqrt{d_h}}, \qquad
        y_k = \operatorname{LayerNorm}_k\Bigl(z_k + O_k \sum_j a_{kj} V z_j\Bigr)

    the scaled dot product of a Transformer (Vaswani et al., 2017, `arXiv:1706.03762
    <https://arxiv.org/abs/1706.03762>`_) with the tasks in the place of the words. The weights
    :math:`a` say which task listens to which: :meth:`attention_weights`, and
    :func:`~lightning_flatmtl.models.attention_picture` for a picture.

    Found from the graph: a task's own are its query :math:`Q_k`, its output :math:`O_k`, its
    normalisation and its head. All else is shared, the extractors too, since all tasks look at
    their features.

    What comes back is a :class:`TaskFeatures`: trunk, extractors, keys and values run once for all
    tasks, the rest in a task's own passes.

    Shapes:
        Inputs as the trunk takes them, tensors or mappings; to ``{task: [batch, features]}``.

    Args:
        tasks: Names of the tasks.
        trunk: Shared by all tasks.
        extractor: Makes the extractor of a task, from the trunk's outputs to
            ``[batch, features]``, each with initial weights of its own.
        features: How many features a task has, at least 1.
        attention_heads: Heads of the attention, a divisor of ``features``.

    Raises:
        ValueError: If an argument is out of its bounds; in ``forward`` if the extractors' outputs
            do not fit.
        TypeError: If ``extractor`` makes no module.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MLPEncoder, TaskAttention
        >>> trunk = MLPEncoder(8, widths=[16])
        >>> encoder = TaskAttention(["a", "b"], trunk, lambda: MLPEncoder(16, widths=[4]), 4)
        >>> {task: tuple(y.shape) for task, y in encoder(torch.zeros(2, 8)).items()}
        {'a': (2, 4), 'b': (2, 4)}
        >>> encoder.attention_weights(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        tasks: Sequence[str],
        trunk: nn.Module,
        extractor: Callable[[], nn.Module],
        features: int,
        attention_heads: int = 1,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        if features < 1:
            raise ValueError(f"`features` must be at least 1, got {features}.")
        if attention_heads < 1 or features % attention_heads:
            raise ValueError(
                f"`attention_heads` must be a divisor of `features`, {features}, got "
                f"{attention_heads}."
            )
        self.out_features, self.attention_heads = features, attention_heads
        self.trunk = trunk
        self.extractors = nn.ModuleDict({task: made("extractor", extractor) for task in self.tasks})
        self.key = nn.Linear(features, features, bias=False)
        self.value = nn.Linear(features, features, bias=False)
        self.queries = nn.ModuleDict(
            {task: nn.Linear(features, features, bias=False) for task in self.tasks}
        )
        self.outputs = nn.ModuleDict({task: nn.Linear(features, features) for task in self.tasks})
        self.norms = nn.ModuleDict({task: nn.LayerNorm(features) for task in self.tasks})

    def forward(self, inputs: Any) -> TaskFeatures:
        """Features of every task; it looks at the others when they are asked for."""
        return TaskFeatures(self, self._seen(inputs))

    def features(self, task: str, shared: _Seen) -> Tensor:
        """What one task makes of the features of all.

        Args:
            task: Its name.
            shared: Features, keys and values of all tasks.
        """
        weights = self._weights(task, shared)
        looked_at = weights @ self._by_head(shared.values)  # [batch, heads, 1, features of a head]
        own = shared.features[:, self.tasks.index(task)]
        found: Tensor = self.norms[task](own + self.outputs[task](looked_at.flatten(1)))
        return found

    @torch.no_grad()
    def attention_weights(self, inputs: Any) -> Tensor:
        """How much each task looks at each, without a graph.

        Args:
            inputs: As for ``forward``.

        Returns:
            ``[batch, attention_heads, tasks, tasks]`` in the order of the tasks; the row is who
            looks, and sums up to 1.
        """
        seen = self._seen(inputs)
        return torch.cat([self._weights(task, seen) for task in self.tasks], 2)

    def _seen(self, inputs: Any) -> _Seen:
        common = self.trunk(inputs)
        found = [self.extractors[task](common) for task in self.tasks]
        for task, each in zip(self.tasks, found, strict=True):
            if each.ndim != 2 or each.shape[1] != self.out_features:
                raise ValueError(
                    f"`extractor` must map to [batch, {self.out_features}], as `features` says, "
                    f"got {list(each.shape)} for task '{task}'."
                )
        features = torch.stack(found, 1)
        return _Seen(features, self.key(features), self.value(features))

    def _weights(self, task: str, seen: _Seen) -> Tensor:
        """``[batch, heads, 1, tasks]``."""
        query = self.queries[task](seen.features[:, self.tasks.index(task)])
        keys = self._by_head(seen.keys)
        products = self._by_head(query[:, None]) @ keys.transpose(2, 3)
        return (products / math.sqrt(keys.shape[3])).softmax(3)

    def _by_head(self, x: Tensor) -> Tensor:
        """``[batch, n, features]`` to ``[batch, heads, n, features of a head]``."""
        n, tasks, width = x.shape
        heads = self.attention_heads
        return x.reshape(n, tasks, heads, width // heads).transpose(1, 2)
