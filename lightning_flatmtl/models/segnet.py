"""SegNet: an encoder that remembers where its maxima were, and a decoder that puts them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_unpool2d

__all__ = ["FILTERS", "SegNet", "SegNetMaps", "conv_block", "draw_as_published"]

FILTERS = (64, 128, 256, 512, 512)
"""Channels of the published network, those of VGG-16."""


class SegNetMaps(NamedTuple):
    """What a SegNet has computed, by level: the finest first."""

    first: tuple[Tensor, ...]
    """After the first convolution of the encoder's level."""
    encoded: tuple[Tensor, ...]
    """Before the level's pooling."""
    unpooled: tuple[Tensor, ...]
    """What the decoder's level begins with."""
    decoded: tuple[Tensor, ...]
    """What it ends with."""


class SegNet(nn.Module):
    r"""SegNet as the published MTAN code has it, for predictions at every pixel.

    An encoder like VGG-16 (:math:`3 \times 3` convolutions with batch normalisation and ReLU; two
    in each of the first two levels, three in each of the others) that halves the image at each
    level, and the mirrored decoder, which puts every value back where its maximum had been
    (Badrinarayanan et al., 2017, `arXiv:1511.00561 <https://arxiv.org/abs/1511.00561>`_;
    Liu et al., 2019, `arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_). Weights are drawn as
    there, by Xavier's normal distribution.

    With a ``DenseHead(64, 13)`` it has 24,981,069 parameters, the number that the published code
    compares with.

    PyTorch calls unpooling on CUDA not deterministic, though the windows do not overlap here:
    ``Trainer(deterministic=True)`` refuses it there, ``deterministic="warn"`` does not. So is it
    with the loss of a segmentation.

    Shapes:
        ``[n, in_channels, height, width]`` to ``[n, filters[0], height, width]``; height and width
        are multiples of 2 to the power of the number of levels, 32.

    Args:
        in_channels: Channels of the images, at least 1.
        filters: Channels of every level, at least one level.

    Attributes:
        out_channels: Channels of the features.

    Raises:
        ValueError: If a size is below 1, or in ``forward`` for images of other sizes.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import SegNet
        >>> SegNet(filters=(4, 8, 8))(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 4, 32, 48])
    """

    def __init__(self, in_channels: int = 3, filters: Sequence[int] = FILTERS) -> None:
        super().__init__()
        if len(filters) == 0:
            raise ValueError("`filters` must name at least one level, got none.")
        for name, size in [("in_channels", in_channels), *(("filters", f) for f in filters)]:
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        self.filters = tuple(filters)
        self.out_channels = self.filters[0]
        self.encoder_first, self.encoder_rest = nn.ModuleList(), nn.ModuleList()
        self.decoder_first, self.decoder_rest = nn.ModuleList(), nn.ModuleList()
        before = [in_channels, *self.filters]
        for level, (of_level, back) in enumerate(zip(self.filters, self.back_to, strict=True)):
            self.encoder_first.append(conv_block(before[level], of_level))
            self.encoder_rest.append(_further(of_level, level))
            self.decoder_first.append(conv_block(of_level, back))
            self.decoder_rest.append(_further(back, level))
        draw_as_published(self)

    @property
    def back_to(self) -> tuple[int, ...]:
        """Channels that the decoder's levels end with: those of the next finer level."""
        return (self.filters[0], *self.filters[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, in_channels, height, width]`` to features of the same size."""
        return self.maps(images).decoded[0]

    def maps(self, images: Tensor) -> SegNetMaps:
        """All maps that attention modules look at.

        Args:
            images: ``[n, in_channels, height, width]``.
        """
        multiple = 2 ** len(self.filters)
        if images.ndim != 4 or images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"`images` must be [n, channels, height, width] with multiples of {multiple}, got "
                f"{list(images.shape)}. Crop or pad them."
            )
        first, encoded, places, x = [], [], [], images
        for begin, rest in zip(self.encoder_first, self.encoder_rest, strict=True):
            first.append(begin(x))
            encoded.append(rest(first[-1]))
            x, where = max_pool2d(encoded[-1], 2, return_indices=True)
            places.append(where)
        unpooled, decoded = [], []
        for level in reversed(range(len(self.filters))):
            unpooled.append(max_unpool2d(x, places[level], (2, 2)))
            x = self.decoder_rest[level](self.decoder_first[level](unpooled[-1]))
            decoded.append(x)
        return SegNetMaps(tuple(first), tuple(encoded), tuple(unpooled[::-1]), tuple(decoded[::-1]))


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution (with the published, redundant bias), normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _further(channels: int, level: int) -> nn.Sequential:
    """One more convolution in the first two levels, two in the others."""
    return nn.Sequential(*(conv_block(channels, channels) for _ in range(1 if level < 2 else 2)))


def draw_as_published(module: nn.Module) -> None:
    """Draw the weights of all convolutions by Xavier's normal distribution; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
