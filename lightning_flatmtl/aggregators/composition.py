"""Loss weights and a gradient method at once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._wrapping import Wrapping, checked_aggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.gradients.combination import scaled, weighted_rows

__all__ = ["Composition"]


@final
class Composition(Wrapping):
    r"""A gradient method on the losses that a weighting has weighed.

    With weights :math:`w` of the weighting the gradient method :math:`A` is shown the losses
    :math:`w_i L_i` and their gradients: :math:`d = A(w_1 g_1, \dots, w_m g_m)`; head i follows
    :math:`w_i h_i`. So ``Composition(UncertaintyWeighting(), PCGrad())`` is PCGrad on the losses of
    uncertainty weighting (`arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_,
    `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_), and ``Composition(IMTLL(), IMTLG())``
    is :class:`IMTL`. What the weighting learns, it learns from the plain losses. Weights of the
    gradient method's own come on top of it.

    With :class:`~lightning_flatmtl.TaskSAM` the weights hold for loss part and flat part. If the
    gradient method looks at more than inner products, the weighted rows take another ``[tasks,
    parameters]`` matrix for the time of its call.

    Args:
        weighting: A method that weighs the losses and looks at no gradient, such as
            :class:`UncertaintyWeighting` or ``LinearScalarization({"a": 2.0, "b": 1.0})``.
        aggregator: A method on the gradients, such as :class:`PCGrad`.

    Raises:
        TypeError: If one of them is no aggregator.
        ValueError: If ``weighting`` looks at gradients, or ``aggregator`` does not.

    Example:
        >>> import torch
        >>> method = Composition(LinearScalarization([2.0, 1.0]), MGDA())
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([1., 1.])
    """

    def __init__(self, weighting: Aggregator, aggregator: Aggregator) -> None:
        self.weighting = checked_aggregator("weighting", weighting)
        self.aggregator = checked_aggregator("aggregator", aggregator)
        if weighting.needs_gradients:
            raise ValueError(
                "`weighting` must be a method that looks at no gradient, such as "
                f"UncertaintyWeighting(), got {weighting!r}."
            )
        if not aggregator.needs_gradients:
            raise ValueError(
                f"`aggregator` must be a method on the gradients, such as CAGrad(), got "
                f"{aggregator!r}, which looks at none."
            )
        self._outer: tuple[tuple[str, ...], Tensor] | None = None
        self._inner: Tensor | None = None
        """Of the present step: weights by the weighting, and by the gradient method itself."""

    @property
    @override
    def parts(self) -> Mapping[str, Aggregator]:
        return {"weighting": self.weighting, "aggregator": self.aggregator}

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        outer = self.weighting.loss_weights(tasks, losses)
        outer = torch.ones(len(tasks), dtype=torch.float64) if outer is None else outer
        weighted = None if losses is None else losses * outer
        self._outer = tasks, outer
        self._inner = self.aggregator.loss_weights(tasks, weighted)
        return outer if self._inner is None else outer * self._inner

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor | None:
        outer = self._weights(gradients)
        found = self.aggregator.row_weights(self._weighted(gradients, outer))
        return None if found is None else found * outer

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        outer = self._weights(gradients)
        shown = self._weighted(gradients, outer)
        found = self.aggregator.row_weights(shown)
        if found is not None:
            return weighted_rows(found * outer, gradients, self)
        return self.aggregator.aggregate(shown)

    def _weights(self, gradients: TaskGradients) -> Tensor:
        assert self._outer is not None
        assert self._outer[0] == gradients.tasks
        return self._outer[1]

    def _weighted(self, gradients: TaskGradients, outer: Tensor) -> TaskGradients:
        """What the gradient method is shown: the gradients of the weighted losses."""
        rows = gradients.jacobian
        if self.requires != "gram":  # else nobody looks at them
            rows = torch.stack([scaled(r, w) for r, w in zip(rows, outer.tolist(), strict=True)])
        return replace(
            gradients,
            jacobian=rows,
            gram=gradients.gram * outer[:, None] * outer[None, :],
            losses=None if gradients.losses is None else gradients.losses * outer,
            loss_weights=self._inner,
        )

    @override
    def reset(self) -> None:
        super().reset()
        self._outer = self._inner = None
