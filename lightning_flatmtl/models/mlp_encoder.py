"""A perceptron on numbers and embedded categories, for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.models.table_embedding import TableEmbedding

__all__ = ["MLPEncoder"]


class MLPEncoder(TableEmbedding):
    r"""A multi-layer perceptron on numeric columns and embeddings of categorical ones.

    The columns of a :class:`TableEmbedding` go through one block per entry of ``widths``: linear
    layer, batch normalisation if wanted, ReLU, dropout if wanted.

    The tables' sizes must be given, since a model is built before data is read. A data module with
    fixed sizes says them, such as :attr:`lightning_flatmtl.data.CensusIncome.CARDINALITIES`.

    Shapes:
        ``{"numeric": float [batch, numeric], "categorical": int64 [batch, len(categories)]}`` to
        ``[batch, widths[-1]]``. Either entry may be missing if there are no such columns; without
        categories the numbers may come as a tensor.

    Args:
        numeric: Number of numeric columns, at least 0.
        categories: Size of the table of each categorical column, at least 1: its greatest index
            plus 1.
        embedding: Length of a category's vector, at least 1.
        widths: Features after every block, at least one block.
        dropout: Probability of dropping a feature after each block, in [0, 1).
        batch_norm: Whether blocks normalise over the batch.

    Raises:
        ValueError: If an argument is out of its bounds, or the inputs do not fit the columns; on a
            GPU an index beyond its table is an assertion of the device instead.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MLPEncoder
        >>> encoder = MLPEncoder(numeric=3, categories=[5, 2], embedding=4, widths=[16, 8])
        >>> numbers, indices = torch.zeros(6, 3), torch.tensor([[4, 1]] * 6)
        >>> encoder({"numeric": numbers, "categorical": indices}).shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        numeric: int,
        categories: Sequence[int] = (),
        embedding: int = 8,
        widths: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        if len(widths) == 0:
            raise ValueError("`widths` must name at least one block, got none.")
        for width in widths:
            if width < 1:
                raise ValueError(f"`widths` must be at least 1, got {width}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        super().__init__(numeric, categories, embedding)
        ends = pairwise([self.out_features, *widths])
        self.features = self.out_features = widths[-1]
        self.blocks = nn.Sequential(
            *(_block(inputs, outputs, dropout, batch_norm) for inputs, outputs in ends)
        )

    @override
    def forward(self, inputs: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Map rows ``{"numeric": ..., "categorical": ...}`` to features ``[batch, features]``."""
        features: Tensor = self.blocks(super().forward(inputs))
        return features


def _block(inputs: int, outputs: int, dropout: float, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(outputs))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
