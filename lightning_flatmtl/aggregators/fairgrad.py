"""Alpha-fair directions."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import fairgrad_weights

__all__ = ["FairGrad"]


@final
class FairGrad(GramAggregator):
    r"""FairGrad (Ban & Ji, 2024, `arXiv:2402.15638 <https://arxiv.org/abs/2402.15638>`_).

    :math:`d = \sum_i w_i g_i` with :math:`w > 0` and :math:`K w = w^{-1/\alpha}`, solved exactly.
    ``alpha=1`` is :class:`NashMTL`; the larger, the more the task that gains least counts. Zero
    gradients are left out; where zero lies in the convex hull of the gradients the direction is
    zero.

    The direction does not scale linearly: multiplying all gradients by s multiplies it by
    :math:`s^{(1 - \alpha) / (1 + \alpha)}`, so smaller gradients give a longer step if
    :math:`\alpha > 1`. If all :math:`g_i = g`, it is
    :math:`(m \lVert g \rVert^2)^{-\alpha/(1+\alpha)}\, m\, g`.

    Args:
        alpha: Degree of fairness, in ``(0, inf)``.
        normalize: Solve for :math:`K / \lVert K \rVert_F`, so that the direction scales with the
            gradients. **Set it with** :class:`~lightning_flatmtl.TaskSAM`: without it the flat
            part, the smaller of the two, gives the longer direction, and small networks did not
            learn.

    Raises:
        ValueError: If ``alpha`` is out of its bounds.

    Example:
        >>> import torch
        >>> FairGrad(alpha=1.0)(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        tensor([1., 1.])
    """

    def __init__(self, alpha: float = 2.0, normalize: bool = False) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"`alpha` must be in (0, inf), got {alpha}.")
        self.alpha = alpha
        self.normalize = normalize

    @property
    @override
    def follows_scale(self) -> bool:
        return self.normalize

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return fairgrad_weights(gram, self.alpha, self.normalize)
