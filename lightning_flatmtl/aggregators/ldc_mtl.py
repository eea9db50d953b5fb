"""Control of the discrepancy between the losses."""

import math
from typing import Literal, final

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._learned import LearnedWeights
from lightning_flatmtl.aggregators._losses import given
from lightning_flatmtl.functional import ldc_mtl_gradient, ldc_mtl_weights

__all__ = ["LDCMTL"]


@final
class LDCMTL(LearnedWeights, LossWeighting):
    r"""Loss discrepancy control (LDC-MTL; Xiao et al., 2025).

    `arXiv:2502.08585 <https://arxiv.org/abs/2502.08585>`_: model and scores :math:`s` descend, a
    step each, on :math:`\sum_i \sigma_i L_i / [\sum_i \sigma_i] + \lambda \sum_i \lvert \tau_i L_i
    - \tau_{i+1} L_{i+1} \rvert` with :math:`\sigma = \mathrm{sigmoid}(s)`, heads included; the
    bracket counts as constant. The sum on the right goes over neighbours in the order of the tasks.
    As in the published code for many tasks the scores are one number per task that begins at 1;
    they have an Adam of their own, out of reach of the model's weight decay and clipping.

    If all :math:`g_i = g`, the losses are equal and the scores have not moved, the direction is
    :math:`g`.

    Args:
        lam: :math:`\lambda`, in ``[0, inf)``; more than about :math:`0.7 / m` can give negative
            weights, which let a small loss rise.
        compared: Whether the ``"weighted"`` losses are compared (:math:`\tau = \sigma`) or the
            ``"plain"`` ones (:math:`\tau = 1`).
        lr: Learning rate of the scores, in ``(0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds, or the losses are missing.

    Example:
        >>> import torch
        >>> LDCMTL(lam=0.5, compared="plain")(torch.eye(2), losses=[1.0, 3.0])
        tensor([0., 1.])
    """

    def __init__(
        self,
        lam: float = 0.1,
        compared: Literal["weighted", "plain"] = "weighted",
        lr: float = 1e-3,
    ) -> None:
        super().__init__(lr)
        if not 0 <= lam < math.inf:
            raise ValueError(f"`lam` must be in [0, inf), got {lam}.")
        if compared not in {"weighted", "plain"}:
            raise ValueError(f"`compared` must be 'weighted' or 'plain', got {compared!r}.")
        self.lam = lam
        self.compared: Literal["weighted", "plain"] = compared

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        values = given(self, losses)
        scores = 1.0 + self._scalars.values(tasks)
        gradient = ldc_mtl_gradient(scores, values, self.lam, self.compared)
        self._scalars.accumulate(tasks, gradient)
        return ldc_mtl_weights(scores, values, self.lam, self.compared)
