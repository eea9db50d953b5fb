"""Dual balancing: logarithms of the losses, gradients of one length."""

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.aggregators._rows import KeptRows
from lightning_flatmtl.engine import TaskGradients, gram_matrix
from lightning_flatmtl.engine.aggregation import Requires
from lightning_flatmtl.engine.gradients.combination import scaled, weighted_rows
from lightning_flatmtl.functional import db_mtl_weights, scale_invariant_weights

__all__ = ["DBMTL"]


@final
class DBMTL(Aggregator):
    r"""Dual-balancing multi-task learning (DB-MTL; Lin et al., 2023).

    `arXiv:2308.12029 <https://arxiv.org/abs/2308.12029>`_: the losses are replaced by their
    logarithms, heads included; of the shared gradients :math:`h_i = g_i / L_i` moving averages
    :math:`\hat h_i` are kept, and :math:`d = \max_j \lVert \hat h_j \rVert \sum_i \hat h_i / \lVert
    \hat h_i \rVert`. A gradient of zero has no direction and is left out. The losses must be
    positive.

    With ``beta > 0`` the averages take another ``[tasks, parameters]`` matrix of memory (two with
    :class:`~lightning_flatmtl.TaskSAM`) and stand in the checkpoint.

    If all :math:`g_i = g` and all losses are L, the direction is :math:`m\,g / L`.

    Args:
        beta: Share of the old average, in ``[0, 1)``; 0 keeps none.

    Raises:
        ValueError: If ``beta`` is out of its bounds, or a loss is missing or not positive.

    Example:
        >>> import torch
        >>> DBMTL()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), losses=[1.0, 1.0])
        tensor([3., 3.])
    """

    def __init__(self, beta: float = 0.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
        self.beta = beta
        self._averages = KeptRows()

    @property
    @override
    def requires(self) -> Requires:
        return "matrix" if self.beta > 0 else "gram"  # the averages are of whole rows

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return scale_invariant_weights(positive(self, tasks, losses))

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor | None:
        return db_mtl_weights(gradients.gram, gradients.loss_weights) if self.beta == 0 else None

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        weights = self.row_weights(gradients)
        if weights is not None:
            return weighted_rows(weights, gradients, self)
        averages = torch.stack(self._move(gradients))
        shown = replace(gradients, jacobian=averages, gram=gram_matrix(averages).cpu())
        direction = weighted_rows(db_mtl_weights(shown.gram), shown, self)
        return direction.to(gradients.jacobian.dtype)

    def _move(self, gradients: TaskGradients) -> list[Tensor]:
        assert gradients.loss_weights is not None
        weights = gradients.loss_weights.tolist()
        wide = torch.promote_types(gradients.jacobian.dtype, torch.float32)
        rows = (scaled(row.to(wide), w) for row, w in zip(gradients.jacobian, weights, strict=True))
        return self._averages.move(gradients.part, gradients.tasks, rows, self.beta)

    @override
    def reset(self) -> None:
        super().reset()
        self._averages.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        if self.beta == 0:
            return {}
        return {"averages": self._averages.state_dict()}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._averages.load_state_dict(state["averages"])
