"""The small trunk of the first Multi-MNIST papers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["LeNetEncoder"]


class LeNetEncoder(nn.Module):
    r"""LeNet without its last layer (LeCun et al., 1998), as Multi-MNIST is trained on it.

    One block per entry of ``widths``: a convolution without padding, ReLU, :math:`2 \times 2` max
    pooling; then a linear layer and a ReLU. With the defaults and two ``Linear(50, 10)`` it has
    31,910 parameters, those of the LeNet in Pareto MTL
    (`arXiv:1912.12854 <https://arxiv.org/abs/1912.12854>`_).

    Shapes:
        ``[batch, in_channels, size, size]`` to ``[batch, features]``.

    Args:
        in_channels: Channels of the images, at least 1.
        widths: Channels after every block, at least one block.
        kernels: Kernel sizes, one for each block.
        features: Number of features handed to the heads, at least 1.
        size: Height and width of the images in pixels; every block must leave a pixel of it.

    Raises:
        ValueError: If a size is below 1, the blocks do not fit each other or the image.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import LeNetEncoder
        >>> encoder = LeNetEncoder()
        >>> encoder(torch.zeros(2, 1, 36, 36)).shape
        torch.Size([2, 50])
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (10, 20),
        kernels: Sequence[int] = (9, 5),
        features: int = 50,
        size: int = 36,
    ) -> None:
        super().__init__()
        if len(widths) == 0 or len(widths) != len(kernels):
            raise ValueError(
                "`widths` and `kernels` must have one entry for each block, got "
                f"{list(widths)} and {list(kernels)}."
            )
        sizes = {"in_channels": in_channels, "features": features, "size": size}
        listed = [("widths", width) for width in widths] + [("kernels", k) for k in kernels]
        for name, value in [*sizes.items(), *listed]:
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        left = size
        for kernel in kernels:
            left = (left - kernel + 1) // 2
        if left < 1:
            raise ValueError(
                f"`size` must leave a pixel behind kernels {list(kernels)}, got {size}."
            )
        inputs = [in_channels, *widths[:-1]]
        self.blocks = nn.Sequential(*map(_block, inputs, widths, kernels))
        self.project = nn.Sequential(
            nn.Flatten(), nn.Linear(widths[-1] * left * left, features), nn.ReLU()
        )
        self.out_features = features

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, size, size]`` to features ``[batch, features]``."""
        features: Tensor = self.project(self.blocks(images))
        return features


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel), nn.ReLU(), nn.MaxPool2d(2))
