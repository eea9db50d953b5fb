"""Networks that the benchmarks time."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

__all__ = ["resnet18", "two_heads"]


def resnet18(width: int) -> nn.Sequential:
    """ResNet-18 for small images (3x3 stem, no pooling in front) with ``width`` first channels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage in range(4):
        planes = width * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            shortcut = None
            if stride != 1 or channels != planes:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
                )
            layers.append(BasicBlock(channels, planes, stride, shortcut))
            channels = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TwoHeads(nn.Module):
    """An encoder and a linear head for each of ``tasks`` tasks."""

    def __init__(self, encoder: nn.Module, features: int, tasks: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(features, 10) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        return [head(features) for head in self.heads]


def two_heads(width: int, tasks: int = 2) -> TwoHeads:
    """A ResNet-18 trunk with linear heads on its ``8 * width`` features."""
    torch.manual_seed(0)
    return TwoHeads(resnet18(width), 8 * width, tasks)
