"""torchvision's ResNets as trunks of dense predictions: a map, of an eighth of the image's size."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from typing_extensions import override

from lightning_flatmtl.models.resnet_encoder import ResNetEncoder

__all__ = ["DilatedResNetEncoder"]

_PLANES = {8: (256, 512), 16: (512,)}
"""The stages, by torchvision's channels, whose stride becomes a dilation."""


class DilatedResNetEncoder(ResNetEncoder):
    r"""A residual trunk that keeps more of the image's resolution, for dense prediction.

    torchvision's ResNet without its last pooling, whose last two stages (or the last one) have
    convolutions of dilation 2 and 4 instead of a stride: the trunk of DeepLab v3 (Chen et al.,
    2017, `arXiv:1706.05587 <https://arxiv.org/abs/1706.05587>`_). A :class:`DeepLabV3Head` for
    every task is the usual other network of the NYUv2 and Cityscapes benchmarks.

    Shapes:
        ``[n, in_channels, height, width]`` to
        ``[n, out_channels, height / output_stride, width / output_stride]``.

    Args:
        name: The depth, as torchvision names it; its small blocks, of ``resnet18`` and
            ``resnet34``, cannot be dilated.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage, at least 1; 64 is the published network.
        output_stride: 8, or 16 for a quarter of the memory of the last two stages.
        weights: Pretrained weights by torchvision's name, see :class:`ResNetEncoder`.
        channels_last: See :class:`ResNetEncoder`.

    Attributes:
        out_channels: Channels of the features, 32 times ``width``.

    Raises:
        ValueError: If an argument is out of its bounds, or the weights do not fit the network.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import DilatedResNetEncoder
        >>> DilatedResNetEncoder(width=4)(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 128, 4, 6])
    """

    def __init__(
        self,
        name: Literal["resnet50", "resnet101", "resnet152"] = "resnet50",
        in_channels: int = 3,
        width: int = 64,
        output_stride: Literal[8, 16] = 8,
        weights: str | None = None,
        channels_last: bool = False,
    ) -> None:
        if name in {"resnet18", "resnet34"}:
            raise ValueError(f"`name` must be 'resnet50' or deeper, got {name!r}.")
        if output_stride not in _PLANES:
            raise ValueError(f"`output_stride` must be 8 or 16, got {output_stride}.")
        self._dilated = _PLANES[output_stride]
        super().__init__(
            name, in_channels, width=width, weights=weights, channels_last=channels_last
        )
        self.out_channels = self.out_features

    @override
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x

    @override
    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        return super()._make_layer(block, planes, blocks, stride, planes in self._dilated)
