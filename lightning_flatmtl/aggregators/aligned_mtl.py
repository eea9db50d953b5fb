"""Gradients with balanced singular values."""

from typing import Literal, final, get_args

from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._preference import Preference
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import aligned_mtl_weights

__all__ = ["AlignedMTL"]

Scale = Literal["min", "median", "rmse"]


@final
class AlignedMTL(GramAggregator):
    r"""Aligned-MTL (Senushkin et al., 2023, `arXiv:2305.19000 <https://arxiv.org/abs/2305.19000>`_).

    The mean of the aligned gradients: the nearest matrix to G, up to scale, whose singular values
    are all equal. Directions that the gradients do not span, to rounding, are left out.

    Args:
        scale: The common singular value: the smallest (``"min"``, the paper's), the ``"median"``,
            or the root mean square (``"rmse"``).
        preference: A weight per task for the mean, by name or in the order of the tasks, each in
            ``[0, inf)``; they are divided by their sum. Equal by default.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> AlignedMTL()(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self, scale: Scale = "min", preference: dict[str, float] | list[float] | None = None
    ) -> None:
        if scale not in get_args(Scale):
            raise ValueError(f"`scale` must be one of {list(get_args(Scale))}, got {scale!r}.")
        self.scale = scale
        self.preference = preference
        self._preference = Preference(preference)

    @property
    @override
    def needs_tasks(self) -> bool:
        return self.preference is not None

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        return aligned_mtl_weights(gram, self.scale, self._preference.shares(gradients.tasks))
