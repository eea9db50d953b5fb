"""DeepLab's head: what lies around a pixel, near and far, and back to the image's size."""

from __future__ import annotations

from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

__all__ = ["DeepLabV3Head"]


class DeepLabV3Head(nn.Sequential):
    r"""torchvision's head of DeepLab v3, and bilinear interpolation to the size of the image.

    Atrous spatial pyramid pooling of 256 channels, with a branch that sees the whole image, then a
    :math:`3 \times 3` and a :math:`1 \times 1` convolution (Chen et al., 2017,
    `arXiv:1706.05587 <https://arxiv.org/abs/1706.05587>`_). That branch is normalised over the
    batch: in training a batch needs two images or more.

    Bilinear interpolation has no deterministic backward on CUDA: ``Trainer(deterministic=True)``
    refuses it there, ``deterministic="warn"`` does not.

    Shapes:
        ``[n, in_channels, height, width]`` to
        ``[n, out_channels, scale * height, scale * width]``.

    Args:
        in_channels: Channels of the features, at least 1.
        out_channels: Channels of the prediction, at least 1.
        scale: How much larger than its features the image is, at least 1: the trunk's
            ``output_stride``.
        rates: Dilations of the pyramid.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import DeepLabV3Head
        >>> DeepLabV3Head(16, 13)(torch.zeros(2, 16, 4, 6)).shape
        torch.Size([2, 13, 32, 48])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale: int = 8,
        rates: tuple[int, ...] = (12, 24, 36),
    ) -> None:
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "scale": scale}
        for name, size in [*sizes.items(), *(("rates", rate) for rate in rates)]:
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        super().__init__(
            DeepLabHead(in_channels, out_channels, tuple(rates)),
            nn.Upsample(scale_factor=float(scale), mode="bilinear", align_corners=False),
        )
