"""The multiple-gradient descent algorithm."""

from typing import final, get_args

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import mgda_weights
from lightning_flatmtl.functional.mgda import Normalization

__all__ = ["MGDA"]


@final
class MGDA(GramAggregator):
    r"""The min-norm point of the convex hull of the gradients (Sener & Koltun, 2018).

    `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_: :math:`d = \sum_i w_i g_i` with
    :math:`w = \arg\min_{w \in \Delta} \lVert \sum_i w_i g_i / n_i \rVert^2`. The normalisers
    :math:`n_i` shape the weights only; the weights are applied to the raw gradients (LibMTL applies
    them to the normalised ones).

    If all :math:`g_i = g`, the direction is :math:`g`. A zero gradient makes it zero: no direction
    descends for all tasks.

    Args:
        normalization: ``"none"`` (:math:`n_i = 1`), ``"l2"`` (:math:`\lVert g_i \rVert`),
            ``"loss"`` (:math:`L_i`) or ``"loss+"`` (:math:`L_i \lVert g_i \rVert`). The losses
            must be positive where they are used.

    Raises:
        ValueError: If ``normalization`` is none of these, or a loss is needed and is missing or not
            positive.

    Example:
        >>> import torch
        >>> MGDA()(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1., 1.])
    """

    def __init__(self, normalization: Normalization = "none") -> None:
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"`normalization` must be one of {list(get_args(Normalization))}, got "
                f"{normalization!r}."
            )
        self.normalization = normalization

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.normalization in {"loss", "loss+"}

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        losses = gradients.losses
        if self.normalization in {"loss", "loss+"}:
            losses = positive(self, gradients.tasks, losses)
        return mgda_weights(gram, self.normalization, losses)
