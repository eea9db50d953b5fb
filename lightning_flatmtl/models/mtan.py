"""MTAN: a SegNet for all tasks, and attention modules that choose for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from lightning_flatmtl.models._task_features import TaskFeatures, checked_tasks
from lightning_flatmtl.models.segnet import (
    FILTERS,
    SegNet,
    SegNetMaps,
    conv_block,
    draw_as_published,
)

__all__ = ["MTAN", "MTANFeatures"]

MTANFeatures = TaskFeatures
"""What :class:`MTAN` returns."""


class MTAN(nn.Module):
    r"""Multi-task attention network on a SegNet (Liu et al., 2019).

    All tasks share a :class:`SegNet`. At each of its levels, down and up, a task has an attention
    module of its own, which looks at the level's map and at what the task has chosen so far, and
    multiplies the level's second map by a mask in (0, 1)
    (`arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_). The result is a map of features for
    each task, which a :class:`DenseHead` reads. Weights are drawn as in the published code.

    As published, the convolutions *between* the attention modules of consecutive levels are shared
    by all tasks too, and so are their running statistics, which every task updates. So the shared
    parameters are those of the SegNet and these convolutions; a task's own are its attention
    modules and its head. With ``DenseHead`` of 13, 1 and 3 channels there are 44,229,073
    parameters. The published code has 3 more, scales of its uncertainty weighting, which here is
    :class:`~lightning_flatmtl.aggregators.UncertaintyWeighting`. Its topmost decoder attention
    counts on ``filters[-1]`` and ``filters[-2]`` to be equal, which is not needed here.

    What comes back is a :class:`TaskFeatures`: the SegNet runs once for all tasks, the attention
    modules of a task in its own passes.

    About determinism see :class:`SegNet`; bilinear interpolation has no deterministic backward on
    CUDA either.

    Shapes:
        ``[n, in_channels, height, width]`` to ``{task: [n, filters[0], height, width]}``; height
        and width are multiples of 2 to the power of the number of levels, 32.

    Args:
        tasks: Names of the tasks.
        in_channels: Channels of the images, at least 1.
        filters: Channels of every level, at least one level.

    Attributes:
        out_channels: Channels of the features of a task.

    Raises:
        ValueError: If there is no task, or one twice, or a size is below 1.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import MTAN
        >>> features = MTAN(["segmentation", "depth"], filters=(4, 8))(torch.zeros(1, 3, 8, 8))
        >>> {task: tuple(x.shape) for task, x in features.items()}
        {'segmentation': (1, 4, 8, 8), 'depth': (1, 4, 8, 8)}
    """

    def __init__(
        self, tasks: Sequence[str], in_channels: int = 3, filters: Sequence[int] = FILTERS
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        self.segnet = SegNet(in_channels, filters)
        self.out_channels = self.segnet.out_channels
        down, back = self.segnet.filters, self.segnet.back_to
        coarser, above = [*down[1:], down[-1]], [*back[1:], down[-1]]
        # Shared by all tasks: from a level's choice to the next level's attention.
        self.between_down = nn.ModuleList(map(conv_block, down, coarser))
        self.between_up = nn.ModuleList(map(conv_block, above, back))
        self.attention = nn.ModuleDict({task: _Attention(down, back) for task in self.tasks})
        draw_as_published(self)

    def forward(self, images: Tensor) -> MTANFeatures:
        """Features of every task, computed when they are asked for."""
        return MTANFeatures(self, self.segnet.maps(images))

    def features(self, task: str, shared: SegNetMaps) -> Tensor:
        """What the attention modules of one task make of the shared maps.

        Args:
            task: Its name.
            shared: The maps of the SegNet.
        """
        own = self.attention[task]
        assert isinstance(own, _Attention)
        chosen: Tensor | None = None
        for level, first in enumerate(shared.first):
            seen = first if chosen is None else torch.cat([first, chosen], 1)
            chosen = own.down[level](seen) * shared.encoded[level]
            chosen = max_pool2d(self.between_down[level](chosen), 2)
        assert chosen is not None
        for level in reversed(range(len(shared.first))):
            larger = interpolate(chosen, scale_factor=2, mode="bilinear", align_corners=True)
            seen = torch.cat([shared.unpooled[level], self.between_up[level](larger)], 1)
            chosen = own.up[level](seen) * shared.decoded[level]
        return chosen


class _Attention(nn.Module):
    """The attention modules of one task, down and up."""

    def __init__(self, down: Sequence[int], back: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _mask(2 * channels if level else channels, channels)
            for level, channels in enumerate(down)
        )
        self.up = nn.ModuleList(
            _mask(channels + outputs, outputs) for channels, outputs in zip(down, back, strict=True)
        )


def _mask(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )
