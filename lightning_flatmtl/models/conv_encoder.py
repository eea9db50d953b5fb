"""A small convolutional trunk for the quick benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["ConvEncoder"]


class ConvEncoder(nn.Module):
    r"""A small convolutional trunk with batch normalisation, for images of any size.

    One block per entry of ``widths``: :math:`3 \times 3` convolution, batch normalisation, ReLU,
    :math:`2 \times 2` max pooling. What is left is averaged to a ``grid`` x ``grid`` map, flattened
    and sent through fully connected layers, each with a ReLU: one per entry of ``hidden``, and one
    to ``features``. A grid larger than one keeps *where* something was
    seen, which tasks such as "the digit in the top-left corner" depend on.

    Pooling rounds up, so a map never shrinks below one pixel, however small the image. Adaptive
    pooling has no deterministic backward on CUDA: ``Trainer(deterministic=True)`` refuses it there,
    ``deterministic="warn"`` does not.

    Shapes:
        ``[batch, in_channels, height, width]`` to ``[batch, features]``.

    Args:
        in_channels: Channels of the images, at least 1.
        widths: Channels after every block, at least one block.
        features: Number of features handed to the heads, at least 1.
        grid: Rows and columns of the map that the first fully connected layer reads, at least 1.
        hidden: Widths of fully connected layers in front of the last one, each at least 1.

    Raises:
        ValueError: If a size is below 1 or ``widths`` is empty.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import ConvEncoder
        >>> encoder = ConvEncoder(in_channels=3, widths=(8, 16), features=32)
        >>> encoder(torch.zeros(5, 3, 20, 30)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        features: int = 64,
        grid: int = 2,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if len(widths) == 0:
            raise ValueError("`widths` must name at least one block, got none.")
        sizes = {"in_channels": in_channels, "features": features, "grid": grid}
        listed = [("widths", width) for width in widths] + [("hidden", width) for width in hidden]
        for name, size in [*sizes.items(), *listed]:
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        self.in_channels, self.features = in_channels, features
        inputs = [in_channels, *widths[:-1]]
        self.blocks = nn.Sequential(*map(_block, inputs, widths))
        self.project = nn.Sequential(
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
            *_fully_connected([widths[-1] * grid * grid, *hidden, features]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to features ``[batch, features]``."""
        features: Tensor = self.project(self.blocks(images))
        return features


def _fully_connected(widths: Sequence[int]) -> list[nn.Module]:
    pairs = pairwise(widths)
    return [layer for ends in pairs for layer in (nn.Linear(*ends), nn.ReLU())]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, normalisation, ReLU, pooling; the norm layer's shift makes a bias redundant."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
    )
