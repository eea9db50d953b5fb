"""Weights from learned task uncertainties."""

from typing import final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._learned import LearnedWeights
from lightning_flatmtl.functional import uncertainty_gradient, uncertainty_weights

__all__ = ["UncertaintyWeighting"]


@final
class UncertaintyWeighting(LearnedWeights, LossWeighting):
    r"""Uncertainty weighting (UW; Kendall et al., 2018).

    `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_: descends on :math:`\sum_i e^{-s_i} L_i +
    s_i` over the model and the log-variances :math:`s_i`, so the weights are :math:`e^{-s_i}`,
    heads included. The scalars start at 0 and have an Adam of their own, out of reach of the
    model's weight decay and clipping (published code trains them with the model's optimizer).

    Args:
        lr: Learning rate of the log-variances, in ``(0, inf)``.
        half: Divide the objective by two, as the derivation for regression and some published code
            do: half the weights.

    Raises:
        ValueError: If ``lr`` is out of its bounds.

    Example:
        >>> import torch
        >>> UncertaintyWeighting()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), losses=[0.5, 4.0])
        tensor([1., 2.])
    """

    def __init__(self, lr: float = 1e-3, half: bool = False) -> None:
        super().__init__(lr)
        self.half = half

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        s = self._scalars.values(tasks)
        if losses is not None:
            self._scalars.accumulate(tasks, uncertainty_gradient(s, losses, self.half))
        return uncertainty_weights(s, self.half)
