"""Conflict-free inverse gradients."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import config_weights

__all__ = ["ConFIG"]


@final
class ConFIG(GramAggregator):
    r"""Conflict-free inverse gradients (ConFIG; Liu et al., 2024).

    `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_: the unit vector :math:`u` that has the
    same projection on all unit gradients, :math:`u \propto U^+ \mathbf 1`, as long as the sum of
    the gradients' projections on it, :math:`d = (\sum_i \langle g_i, u \rangle)\, u`. It lies on
    the line of :class:`IMTLG`, with another length. A gradient of zero is left out; where no vector
    has equal, positive projections (opposed gradients), the pseudo-inverse gives the nearest, zero
    in the extreme.

    If all :math:`g_i = g`, the direction is :math:`m\,g`.

    Example:
        >>> import torch
        >>> ConFIG()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([2., 2.])
    """

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return config_weights(gram)
