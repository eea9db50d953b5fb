"""A perceptron on numbers and embedded categories, for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLPEncoder"]


class MLPEncoder(nn.Module):
    r"""A multi-layer perceptron on numeric columns and embeddings of categorical ones.

    Every categorical column has a table of vectors of its own. The vectors of a row's categories
    and its numbers, side by side, go through one block per entry of ``widths``: linear layer, batch
    normalisation if wanted, ReLU, dropout if wanted.

    The tables' sizes must be given, since a model is built before data is read. A data module with
    fixed sizes says them, such as :attr:`lightning_flatmtl.data.CensusIncome.CARDINALITIES`.

    Shapes:
        ``{"numeric": float [batch, numeric], "categorical": int64 [batch, len(categories)]}`` to
        ``[batch, widths[-1]]``. Either entry may be missing if there are no such columns.

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

    starts: Tensor
    sizes: Tensor

    def __init__(
        self,
        numeric: int,
        categories: Sequence[int] = (),
        embedding: int = 8,
        widths: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if numeric < 0:
            raise ValueError(f"`numeric` must be at least 0, got {numeric}.")
        if numeric == 0 and len(categories) == 0:
            raise ValueError("`numeric` and `categories` must name at least one column, got none.")
        if len(widths) == 0:
            raise ValueError("`widths` must name at least one block, got none.")
        sizes = {"categories": categories, "embedding": [embedding], "widths": widths}
        for name, values in sizes.items():
            for value in values:
                if value < 1:
                    raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        self.numeric, self.categories, self.features = numeric, tuple(categories), widths[-1]
        # One table for all columns: a single look-up however many columns there are.
        starts = [0, *accumulate(categories)][:-1]
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int64), persistent=False)
        self.register_buffer(
            "sizes", torch.tensor(self.categories, dtype=torch.int64), persistent=False
        )
        self.table = nn.Embedding(sum(categories), embedding) if categories else None
        inputs = numeric + embedding * len(categories)
        self.blocks = nn.Sequential(
            *(_block(*ends, dropout, batch_norm) for ends in pairwise([inputs, *widths]))
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Map rows ``{"numeric": ..., "categorical": ...}`` to features ``[batch, features]``."""
        columns = []
        if self.table is not None:
            indices = self._columns(inputs, "categorical", len(self.categories))
            self._check_indices(indices)
            columns.append(self.table(indices + self.starts).flatten(1))
        if self.numeric:
            columns.append(self._columns(inputs, "numeric", self.numeric))
        features: Tensor = self.blocks(torch.cat(columns, 1))
        return features

    def _columns(self, inputs: Mapping[str, Tensor], kind: str, count: int) -> Tensor:
        if not isinstance(inputs, Mapping) or kind not in inputs:
            got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"The inputs must be a mapping with '{kind}', got {got}.")
        found = inputs[kind]
        if found.ndim != 2 or found.shape[1] != count:
            said = "numeric" if kind == "numeric" else "categories"
            raise ValueError(
                f"'{kind}' must have the shape [batch, {count}], as `{said}` says, got "
                f"{list(found.shape)}."
            )
        return found

    def _check_indices(self, indices: Tensor) -> None:
        """Refuse an index beyond its column's table, which would read another column's."""
        fits = (indices >= 0) & (indices < self.sizes)
        if indices.device.type != "cpu" or torch.compiler.is_compiling():
            # Not waited for: the device asserts it on its own time.
            torch.ops.aten._assert_async.msg(fits.all(), "`categories` are too small for the data")
            return
        if not fits.all():
            row, column = (~fits).nonzero()[0].tolist()
            raise ValueError(
                f"`categories` must be larger than the indices of its column: column {column} has "
                f"a table of {self.categories[column]}, got index {int(indices[row, column])}."
            )


def _block(inputs: int, outputs: int, dropout: float, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(outputs))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
