"""Targets of every pixel as tv_tensors: torchvision's v2 transforms do the right thing to each.

They are masks to torchvision, so whatever moves pixels moves theirs with those of the image, to the
nearest pixel, and whatever changes colours leaves them alone. Beyond that they know which value
says "no label", and normals which way they point.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name for it

__all__ = ["Depth", "Normals", "Segmentation"]


class Segmentation(tv_tensors.Mask):
    """The class of every pixel, int64 ``[..., H, W]``; -1 has no label.

    Pixels that a v2 transform adds, by padding or turning, get -1, whatever its ``fill`` says. The
    rest is as in :class:`torchvision.tv_tensors.Mask`.

    Args:
        data: Anything that :func:`torch.as_tensor` takes.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> from lightning_flatmtl.data import Segmentation
        >>> v2.Pad([1, 0, 0, 0])(Segmentation(torch.tensor([[5, 7]]))).tolist()
        [[-1, 5, 7]]
    """

    unlabelled: ClassVar[int] = -1


class Depth(tv_tensors.Mask):
    """The depth (or inverse depth) of every pixel, float ``[..., 1, H, W]``; 0 has no label.

    Pixels are moved, never blended: between two things there is nothing. Values stay as they are,
    also where a transform enlarges a part, for it cannot be told whether the camera comes nearer or
    the resolution grows; :class:`RandomScaleCrop` comes nearer.

    Args:
        data: Anything that :func:`torch.as_tensor` takes.
    """

    unlabelled: ClassVar[int] = 0


class Normals(tv_tensors.Mask):
    """The surface normal of every pixel, float ``[..., 3, H, W]``; the zero vector has no label.

    The channels are x (to the right), y (vertical) and z. A horizontal flip negates x, a vertical
    one y: a wall that looks to the right then looks to the left. Flips, crops, padding and resizing
    are exact; rotating, affine, perspective and elastic transforms, and padding by reflection, are
    refused with a ``TypeError``, since they would leave vectors that point the wrong way.

    Args:
        data: Anything that :func:`torch.as_tensor` takes.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> from lightning_flatmtl.data import Normals
        >>> wall = Normals(torch.tensor([0.8, 0.0, 0.6]).view(3, 1, 1))
        >>> [round(x, 1) for x in v2.RandomHorizontalFlip(p=1)(wall).flatten().tolist()]
        [-0.8, 0.0, 0.6]
    """

    unlabelled: ClassVar[int] = 0


Target = Segmentation | Depth | Normals


def _moved(functional: Callable[..., Any], target: Target, *args: Any, **kwargs: Any) -> Any:
    """Move pixels as those of a mask; new ones have no label.

    Torchvision fills with zeros where a crop leaves the image, and a mask with what ``fill`` says
    to an image: so the value without label becomes zero for a moment.
    """
    if "fill" in kwargs:
        kwargs["fill"] = None
    values, offset = _plain(target), target.unlabelled
    plain = tv_tensors.Mask(values - offset if offset else values)
    moved = _plain(functional(plain, *args, **kwargs))
    return tv_tensors.wrap(moved + offset if offset else moved, like=target)


def _flipped(functional: Callable[..., Any], channel: int, normals: Normals) -> Any:
    """Flip, and negate the component along the flip."""
    flipped = _plain(functional(tv_tensors.Mask(_plain(normals)))).clone()
    flipped[..., channel, :, :].neg_()
    return tv_tensors.wrap(flipped, like=normals)


def _padded(normals: Normals, *args: Any, padding_mode: str = "constant", **kwargs: Any) -> Any:
    if padding_mode in {"reflect", "symmetric"}:
        raise TypeError(
            f"`Normals` cannot be padded by reflection, got padding_mode='{padding_mode}': "
            "mirrored vectors would point the wrong way. Take padding_mode='constant'."
        )
    return _moved(F.pad, normals, *args, padding_mode=padding_mode, **kwargs)


def _refused(name: str, normals: Normals, *args: Any, **kwargs: Any) -> Any:
    raise TypeError(
        f"`Normals` cannot go through `{name}`: the vectors would have to turn with the pixels. "
        "Flip, crop, pad or resize, or leave the normals out."
    )


def _plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor)


def _register() -> None:
    """Tell torchvision what each transform does to each target."""
    moves = (F.horizontal_flip, F.vertical_flip, F.resize, F.crop, F.resized_crop, F.center_crop)
    turns = (F.affine, F.rotate, F.perspective, F.elastic)
    for functional in (*moves, F.pad, *turns):
        for kind in (Segmentation, Depth):
            F.register_kernel(functional, kind)(partial(_moved, functional))
    for functional in moves[2:]:
        F.register_kernel(functional, Normals)(partial(_moved, functional))
    F.register_kernel(F.horizontal_flip, Normals)(partial(_flipped, F.horizontal_flip, 0))
    F.register_kernel(F.vertical_flip, Normals)(partial(_flipped, F.vertical_flip, 1))
    F.register_kernel(F.pad, Normals)(_padded)
    for functional in turns:
        F.register_kernel(functional, Normals)(partial(_refused, functional.__name__))


_register()
