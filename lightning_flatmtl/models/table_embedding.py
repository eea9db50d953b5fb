"""Numbers and embedded categories side by side: where a network for tables begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

__all__ = ["TableEmbedding"]


class TableEmbedding(nn.Module):
    r"""The numeric columns of a table, and a learned vector for each of its categories.

    Every categorical column has a table of vectors of its own. The vectors of a row's categories
    and its numbers, side by side, are the features: the stem of :class:`MMoE`, :class:`CGC` and
    :class:`PLE`, and the first layer of :class:`MLPEncoder`.

    The tables' sizes must be given, since a model is built before data is read. A data module with
    fixed sizes says them, such as :attr:`lightning_flatmtl.data.CensusIncome.CARDINALITIES`.

    Shapes:
        ``{"numeric": float [batch, numeric], "categorical": int64 [batch, len(categories)]}`` to
        ``[batch, embedding * len(categories) + numeric]``. Either entry may be missing if there are
        no such columns; without categories the numbers may come as a tensor.

    Args:
        numeric: Number of numeric columns, at least 0.
        categories: Size of the table of each categorical column, at least 1: its greatest index
            plus 1.
        embedding: Length of a category's vector, at least 1.

    Attributes:
        out_features: How many features come out.

    Raises:
        ValueError: If an argument is out of its bounds, or the inputs do not fit the columns; on a
            GPU an index beyond its table is an assertion of the device instead.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import TableEmbedding
        >>> stem = TableEmbedding(numeric=3, categories=[5, 2], embedding=4)
        >>> numbers, indices = torch.zeros(6, 3), torch.tensor([[4, 1]] * 6)
        >>> stem({"numeric": numbers, "categorical": indices}).shape
        torch.Size([6, 11])
    """

    starts: Tensor
    sizes: Tensor

    def __init__(self, numeric: int, categories: Sequence[int] = (), embedding: int = 8) -> None:
        super().__init__()
        if numeric < 0:
            raise ValueError(f"`numeric` must be at least 0, got {numeric}.")
        if numeric == 0 and len(categories) == 0:
            raise ValueError("`numeric` and `categories` must name at least one column, got none.")
        for name, values in {"categories": categories, "embedding": [embedding]}.items():
            for value in values:
                if value < 1:
                    raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.numeric, self.categories = numeric, tuple(categories)
        self.out_features = numeric + embedding * len(categories)
        # One table for all columns: a single look-up however many columns there are.
        starts = [0, *accumulate(categories)][:-1]
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int64), persistent=False)
        self.register_buffer(
            "sizes", torch.tensor(self.categories, dtype=torch.int64), persistent=False
        )
        self.table = nn.Embedding(sum(categories), embedding) if categories else None

    def forward(self, inputs: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Map rows ``{"numeric": ..., "categorical": ...}`` to ``[batch, out_features]``."""
        if isinstance(inputs, Tensor) and not self.categories:
            inputs = {"numeric": inputs}
        columns = []
        if self.table is not None:
            indices = self._columns(inputs, "categorical", len(self.categories))
            self._check_indices(indices)
            columns.append(self.table(indices + self.starts).flatten(1))
        if self.numeric:
            columns.append(self._columns(inputs, "numeric", self.numeric))
        return torch.cat(columns, 1)

    def _columns(self, inputs: Mapping[str, Tensor] | Tensor, kind: str, count: int) -> Tensor:
        if not isinstance(inputs, Mapping) or kind not in inputs:
            got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"The inputs must be a mapping with '{kind}', got {got}.")
        found: Tensor = inputs[kind]
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
