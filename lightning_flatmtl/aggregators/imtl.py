"""Impartial multi-task learning: by gradients, by losses, by both."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator, LossWeighting
from lightning_flatmtl.aggregators._learned import LearnedWeights
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import imtl_g_weights, imtl_l_gradient, imtl_l_weights

__all__ = ["IMTL", "IMTLG", "IMTLL"]


@final
class IMTLG(GramAggregator):
    r"""IMTL-G: equal projections on all unit gradients.

    Liu et al., 2021, `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    :math:`d = \sum_i w_i g_i` with :math:`\langle d, g_i / \lVert g_i \rVert \rangle` the same for
    all i and :math:`\sum_i w_i = 1`; weights may be negative, and where the norms differ much the
    scaling to the sum 1 may turn the direction round, so that every loss rises. A zero gradient has
    no direction and is left out.

    If all :math:`g_i = g`, the direction is :math:`g`.

    Example:
        >>> import torch
        >>> IMTLG()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.7500])
    """

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return imtl_g_weights(gram)


class _LearnedLossScales(LearnedWeights):
    r"""The loss half of IMTL: :math:`\min_s \sum_i e^{s_i} L_i - s_i`, learned beside the model."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr)

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        s = self._scalars.values(tasks)
        if losses is not None:
            self._scalars.accumulate(tasks, imtl_l_gradient(s, losses))
        return imtl_l_weights(s)


@final
class IMTLL(_LearnedLossScales, LossWeighting):
    r"""IMTL-L: learned loss scales.

    Liu et al., 2021, `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    The losses are multiplied by :math:`e^{s_i}`, heads included, and :math:`s` descends on
    :math:`\sum_i e^{s_i} L_i - s_i`, whose minimum :math:`e^{s_i} = 1 / L_i` makes all scaled
    losses equal. The scales start at 1 and have an Adam of their own, out of reach of the model's
    weight decay and clipping (the published code trains them with the model's optimizer).

    Args:
        lr: Learning rate of the scales, in ``(0, inf)``.

    Raises:
        ValueError: If ``lr`` is out of its bounds.

    Example:
        >>> import torch
        >>> IMTLL()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), losses=[0.5, 2.0])
        tensor([1., 2.])
    """


@final
class IMTL(_LearnedLossScales, GramAggregator):
    r"""IMTL: loss scales by IMTL-L, then directions by IMTL-G.

    Liu et al., 2021, `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    :class:`IMTLG` on the gradients of the scaled losses; each head follows its own scaled loss.

    Args:
        lr: Learning rate of the scales, in ``(0, inf)``.

    Raises:
        ValueError: If ``lr`` is out of its bounds.

    Example:
        >>> import torch
        >>> IMTL()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), losses=[0.5, 2.0])
        tensor([0.7500, 0.7500])
    """

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return imtl_g_weights(gram)
