"""torchvision's ResNets as trunks: other channels, small images, any width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from typing_extensions import override

__all__ = ["ResNetEncoder"]

_WIDTH = 64  # channels of torchvision's first stage
_BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}

Name = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class ResNetEncoder(ResNet):
    r"""A residual trunk (He et al., 2016, `arXiv:1512.03385 <https://arxiv.org/abs/1512.03385>`_).

    It is torchvision's ResNet with the names of its parameters, so that its weights load. What is
    left at the end is averaged to a ``grid`` x ``grid`` map, flattened and, with ``features``, sent
    through a linear layer and a ReLU.

    ``ResNetEncoder(in_channels=1, features=100)`` with two ``Linear(100, 10)`` is the network of
    the Multi-MNIST experiments, 11,223,560 parameters; ``ResNetEncoder(stem="small", grid=2)`` on
    64 x 64 pixels that of CelebA, with 2,048 features.

    Average pooling to a grid larger than 1 has no deterministic backward on CUDA:
    ``Trainer(deterministic=True)`` refuses it there, ``deterministic="warn"`` does not.

    Shapes:
        ``[batch, in_channels, height, width]`` to ``[batch, features]``, or to
        ``[batch, channels * grid * grid]`` with 8 times ``width`` channels, 32 times for
        ``resnet50`` and deeper.

    Args:
        name: The depth, as torchvision names it.
        in_channels: Channels of the images, at least 1.
        stem: ``"imagenet"``, a 7 x 7 convolution of stride 2 and max pooling, which together halve
            an image twice, or ``"small"``, a 3 x 3 convolution of stride 1 and no pooling, for
            images of 32 to 64 pixels.
        width: Channels of the first stage, at least 1; 64 is the published network, 16 has about a
            sixteenth of its parameters.
        grid: Rows and columns of the map that is handed out, at least 1.
        features: Outputs of a linear layer with a ReLU behind the map; ``None`` for the map itself.
        weights: Pretrained weights by torchvision's name, such as ``"DEFAULT"`` or
            ``"IMAGENET1K_V1"``, downloaded on first use; for ``stem="imagenet"`` and
            ``width=64``, with 3 channels or with 1, for which the kernels' channels are summed up.
        channels_last: Keep images and kernels with the channels innermost: the same numbers up to
            rounding, often faster, with mixed precision on a GPU and on a CPU.

    Attributes:
        out_features: How many features the heads get.

    Raises:
        ValueError: If an argument is out of its bounds, or the weights do not fit the network.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import ResNetEncoder
        >>> encoder = ResNetEncoder(in_channels=1, width=16, features=100)
        >>> encoder(torch.zeros(2, 1, 36, 36)).shape
        torch.Size([2, 100])
    """

    def __init__(
        self,
        name: Name = "resnet18",
        in_channels: int = 3,
        stem: Literal["imagenet", "small"] = "imagenet",
        width: int = _WIDTH,
        grid: int = 1,
        features: int | None = None,
        weights: str | None = None,
        channels_last: bool = False,
    ) -> None:
        if name not in _BLOCKS:
            raise ValueError(f"`name` must be one of {', '.join(_BLOCKS)}, got {name!r}.")
        if stem not in {"imagenet", "small"}:
            raise ValueError(f"`stem` must be 'imagenet' or 'small', got {stem!r}.")
        sizes = {"in_channels": in_channels, "width": width, "grid": grid, "features": features}
        for argument, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {size}.")
        if weights is not None:
            _check_weights_fit(in_channels, stem, width)
        self._width = width  # torchvision's constructor asks for it through `_make_layer`
        block, layers = _BLOCKS[name]
        super().__init__(block, layers)
        self.conv1, self.bn1 = _first_convolution(in_channels, stem, width), nn.BatchNorm2d(width)
        if stem == "small":
            self.maxpool = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        channels = 8 * width * block.expansion * grid * grid
        self.fc = nn.Identity() if features is None else _projection(channels, features)
        self.out_features = channels if features is None else features
        if weights is not None:
            self._load(name, weights)
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to features ``[batch, features]``."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = super().forward(images)
        return features

    @override
    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == _WIDTH:  # the first stage follows the stem, which has `width` channels
            self.inplanes = self._width
        planes = planes // _WIDTH * self._width
        layer: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return layer

    def _load(self, name: str, weights: str) -> None:
        """Load pretrained weights for all but what is behind the map."""
        kinds = get_model_weights(name)
        if weights not in kinds.__members__:
            known = ", ".join(repr(kind) for kind in kinds.__members__)
            raise ValueError(f"`weights` must be one of {known} for {name}, got {weights!r}.")
        state = kinds[weights].get_state_dict(progress=True, check_hash=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        if self.conv1.in_channels == 1:
            state["conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
        own = {key: value for key, value in self.state_dict().items() if key.startswith("fc.")}
        self.load_state_dict({**state, **own})


def _first_convolution(in_channels: int, stem: str, width: int) -> nn.Conv2d:
    kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
    layer = nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # as the others
    return layer


def _projection(channels: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, features), nn.ReLU())


def _check_weights_fit(in_channels: int, stem: str, width: int) -> None:
    if stem != "imagenet" or width != _WIDTH or in_channels not in {1, 3}:
        raise ValueError(
            "`weights` are of a network with `stem='imagenet'`, `width=64` and 3 channels (or 1), "
            f"got stem={stem!r}, width={width} and in_channels={in_channels}. Drop `weights`, or "
            "take that network."
        )
