"""The Nash bargaining solution among the tasks."""

import math
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._preference import Preference
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import clip_weights, nash_weights

__all__ = ["NashMTL"]


@final
class NashMTL(GramAggregator):
    r"""Nash-MTL (Navon et al., 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_).

    :math:`d = \sum_i a_i g_i` with :math:`a > 0` and :math:`K a = 1 / a`, solved exactly by
    Newton's method where the published code runs a sequence of convex programs and falls back to
    equal weights when its solver fails. The norm of :math:`d` is :math:`\sqrt m` whatever the
    gradients' norms. Zero gradients are left out; where zero lies in the convex hull of the
    gradients there is no agreement, and the direction is zero.

    Args:
        max_norm: Bound of the norm of the direction, in ``(0, inf)``; 1.0 in the published code,
            ``None`` for no bound. With :class:`~lightning_flatmtl.TaskSAM` it bounds loss part and
            flat part each.
        update_interval: Solve at every so many steps and keep the weights in between, at least 1.
            A step with a task that has no weight yet solves too.
        normalize: Solve for :math:`K / \lVert K \rVert_F`, as the published code does, so that the
            direction is :math:`\lVert K \rVert_F^{1/2}` times as long and scales with the
            gradients. **Set it with** :class:`~lightning_flatmtl.TaskSAM`: without it the flat part
            is as long as the loss part however small the radius, and small networks did not learn.
        preference: Bargaining power of each task, by name or in the order of the tasks, each in
            ``(0, inf)``: :math:`K a = p / a` with :math:`p` scaled to the mean 1. Equal by default.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> NashMTL()(torch.tensor([[2.0, 0.0], [0.0, 0.1]]))
        tensor([1., 1.])
    """

    def __init__(
        self,
        max_norm: float | None = None,
        update_interval: int = 1,
        normalize: bool = False,
        preference: dict[str, float] | list[float] | None = None,
    ) -> None:
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"`max_norm` must be in (0, inf), got {max_norm}.")
        if not isinstance(update_interval, int) or update_interval < 1:
            raise ValueError(f"`update_interval` must be an integer >= 1, got {update_interval!r}.")
        self.max_norm = max_norm
        self.update_interval = update_interval
        self.normalize = normalize
        self.preference = preference
        self._preference = Preference(preference, positive=True)
        self._kept: dict[str, dict[str, float]] = {}
        """By part and task: the weights of the last solve."""
        self._age: dict[str, int] = {}
        """By part: steps since then."""

    @property
    @override
    def follows_scale(self) -> bool:
        return self.normalize

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.preference is not None or self.update_interval > 1

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        weights = self._solve_or_keep(gram, gradients)
        return weights if self.max_norm is None else clip_weights(weights, gram, self.max_norm)

    def _solve_or_keep(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        part, tasks = gradients.part, gradients.tasks
        kept = self._kept.setdefault(part, {})
        age = self._age.get(part, 0) + 1
        if age < self.update_interval and all(task in kept for task in tasks):
            self._age[part] = age
            return torch.tensor([kept[task] for task in tasks], dtype=torch.float64)
        weights = nash_weights(gram, self._powers(tasks), self.normalize)
        if self.update_interval > 1:
            kept.update(zip(tasks, weights.tolist(), strict=True))
            self._age[part] = 0
        return weights

    def _powers(self, tasks: tuple[str, ...]) -> Tensor | None:
        shares = self._preference.shares(tasks)
        return None if shares is None else len(tasks) * shares

    @override
    def reset(self) -> None:
        super().reset()
        self._kept.clear()
        self._age.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        if self.update_interval == 1:
            return {}
        return {"kept": {p: dict(w) for p, w in self._kept.items()}, "age": dict(self._age)}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._kept = {p: dict(w) for p, w in state["kept"].items()}
        self._age = dict(state["age"])
