"""MTAN: a SegNet for all tasks, and attention modules that choose for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_flatmtl.models.segnet import (
    FILTERS,
    SegNet,
    SegNetMaps,
    conv_block,
    draw_as_published,
)

__all__ = ["MTAN", "MTANFeatures"]


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

    What comes back is a mapping that computes a task's features when they are asked for, each time
    anew. So they belong to the task's own pass: a perturbed pass of one task runs the attention of
    that task alone, the head's pass at the separate point does not run the SegNet again, and a task
    that is missing from a batch costs nothing.

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
        if isinstance(tasks, str) or len(tasks) == 0 or len(set(tasks)) < len(tasks):
            raise ValueError(f"`tasks` must be different names, at least one, got {tasks!r}.")
        self.tasks = tuple(tasks)
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

    def features(self, task: str, maps: SegNetMaps) -> Tensor:
        """What the attention modules of one task make of the shared maps.

        Args:
            task: Its name.
            maps: Of the SegNet.
        """
        own = self.attention[task]
        assert isinstance(own, _Attention)
        chosen: Tensor | None = None
        for level, first in enumerate(maps.first):
            seen = first if chosen is None else torch.cat([first, chosen], 1)
            chosen = own.down[level](seen) * maps.encoded[level]
            chosen = max_pool2d(self.between_down[level](chosen), 2)
        assert chosen is not None
        for level in reversed(range(len(maps.first))):
            larger = interpolate(chosen, scale_factor=2, mode="bilinear", align_corners=True)
            seen = torch.cat([maps.unpooled[level], self.between_up[level](larger)], 1)
            chosen = own.up[level](seen) * maps.decoded[level]
        return chosen


class MTANFeatures(Mapping[str, Tensor]):
    """The features of each task, computed when they are asked for, each time anew.

    Args:
        model: Whose attention modules compute them.
        maps: What all tasks share.
    """

    def __init__(self, model: MTAN, maps: SegNetMaps) -> None:
        self._model, self._maps = model, maps

    @override
    def __getitem__(self, task: str) -> Tensor:
        if task not in self._model.tasks:
            raise KeyError(task)
        return self._model.features(task, self._maps)

    @override
    def __contains__(self, task: object) -> bool:
        return task in self._model.tasks

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._model.tasks)

    @override
    def __len__(self) -> int:
        return len(self._model.tasks)


# The tensors of it are the shared maps: who cuts the graph there, or asks what they depend on,
# finds the SegNet and none of the attention modules.
pytree.register_pytree_node(
    MTANFeatures,
    lambda features: ([features._maps], features._model),
    lambda children, model: MTANFeatures(model, *children),
)


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
