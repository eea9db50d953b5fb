"""The published augmentation of NYUv2 and Cityscapes: the camera comes nearer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name for it
from typing_extensions import override

from lightning_flatmtl.data.dense.targets import Depth

__all__ = ["RandomScaleCrop"]


@final
class RandomScaleCrop(v2.Transform):
    r"""Cut a random window out, enlarge it to the full size, and bring depths nearer by as much.

    A transform of torchvision v2, used by the published code of MTAN and all that follows it. A
    scale s is drawn from ``scales``, then a window of ``int(H / s)`` x ``int(W / s)`` pixels, each
    place equally likely; the window is enlarged to H x W. What is s times as large is s times as
    near, so :class:`Depth` is divided by s.

    Images are interpolated bilinearly, :class:`Segmentation`, :class:`Depth` and :class:`Normals`
    take the nearest pixel. The published code differs in two places: it interpolates normals
    bilinearly, which shortens the vectors at edges and blends them with the zero vectors of pixels
    without a label; and it aligns the corner pixels of the image, where torchvision aligns its
    borders, a sixth of a pixel apart at the most.

    Draws from torch's global generator.

    Args:
        scales: The scales, each at least 1.

    Raises:
        ValueError: If there is no scale or one is below 1; if image and targets differ in size.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.data import Depth, RandomScaleCrop
        >>> depth = Depth(torch.full([1, 288, 384], 3.0))
        >>> nearer = RandomScaleCrop(scales=[1.5])(depth)
        >>> tuple(nearer.shape), nearer.unique().tolist()
        ((1, 288, 384), [2.0])
    """

    def __init__(self, scales: Sequence[float] = (1.0, 1.2, 1.5)) -> None:
        super().__init__()
        if not scales or not all(1 <= scale < float("inf") for scale in scales):
            raise ValueError(f"`scales` must be numbers in [1, inf), at least one, got {scales}.")
        self.scales = tuple(scales)

    @override
    def check_inputs(self, flat_inputs: list[Any]) -> None:
        sizes = {tuple(F.get_size(part)) for part in flat_inputs if _has_pixels(part)}
        if len(sizes) > 1:
            raise ValueError(f"Image and targets must be of one size, got {sorted(sizes)}.")

    @override
    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = F.get_size(flat_inputs[0])
        scale = self.scales[_below(len(self.scales))]
        height, width = (max(1, int(pixels / scale)) for pixels in size)
        return {
            "scale": scale,
            "window": {
                "top": _below(size[0] - height + 1),
                "left": _below(size[1] - width + 1),
                "height": height,
                "width": width,
                "size": size,
            },
        }

    @override
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["scale"] == 1:
            return inpt
        enlarged = self._call_kernel(
            F.resized_crop,
            inpt,
            **params["window"],
            interpolation=v2.InterpolationMode.BILINEAR,
            antialias=False,
        )
        if isinstance(enlarged, Depth):
            return tv_tensors.wrap(enlarged.as_subclass(Tensor) / params["scale"], like=enlarged)
        return enlarged


def _has_pixels(part: Any) -> bool:
    return isinstance(part, tv_tensors.Image | tv_tensors.Video | tv_tensors.Mask)


def _below(bound: int) -> int:
    """A random whole number in [0, bound)."""
    return int(torch.randint(bound, ()))
