"""What turns a map of features into a prediction for every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DenseHead", "UnitLength"]


class DenseHead(nn.Sequential):
    r"""A :math:`3 \times 3` and a :math:`1 \times 1` convolution, as in the published MTAN code.

    There is no activation between the two, as there; weights are drawn as there, by Xavier's
    normal distribution.

    Shapes:
        ``[n, in_channels, height, width]`` to ``[n, out_channels, height, width]``.

    Args:
        in_channels: Channels of the features, at least 1.
        out_channels: Channels of the prediction, at least 1.

    Raises:
        ValueError: If a number of channels is below 1.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import DenseHead
        >>> DenseHead(64, 13)(torch.zeros(2, 64, 8, 12)).shape
        torch.Size([2, 13, 8, 12])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, padding=1),
            nn.Conv2d(in_channels, out_channels, 1),
        )
        for conv in self:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_normal_(conv.weight)
            nn.init.zeros_(conv.bias)


class UnitLength(nn.Module):
    """Brings the vector of each pixel to length 1; one of exactly 0 stays, as if let through.

    Shapes:
        ``[n, channels, ...]`` to the same.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import UnitLength
        >>> UnitLength()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """

    def forward(self, vectors: Tensor) -> Tensor:
        """Divide by the length over the second axis; the result is in float32 at least."""
        # Squares of half precision overflow from 256 on.
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        squares = vectors.square().sum(1, keepdim=True)
        # The root of what is not 0: the gradient at 0 is that of the identity, not NaN.
        return vectors * torch.where(squares > 0, squares, 1.0).rsqrt()
