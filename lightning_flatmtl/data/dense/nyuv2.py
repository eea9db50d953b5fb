"""NYUv2: what is where in a room, how far, and which way does it look?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

from lightning_flatmtl.data.dense._module import DenseDataModule
from lightning_flatmtl.data.dense.pack import DEPTH, IMAGE, NORMALS, Quantity

__all__ = ["NYUv2"]

LAYOUT = """
train/image/0.npy, 1.npy, ...    [H, W, 3], colours in [0, 1]
train/label/0.npy, 1.npy, ...    [H, W], classes 0 to 12, -1 without a label
train/depth/0.npy, 1.npy, ...    [H, W, 1], 0 without a label
train/normal/0.npy, 1.npy, ...   [H, W, 3], unit vectors, zero without a label
val/...                          the same
"""

SOURCES = """
https://github.com/lorenmt/mtan: its README links the pack (nyuv2.zip, 288 x 384, 795 + 654 images)
"""


@final
class NYUv2(DenseDataModule):
    r"""Segmentation, depth and surface normals of indoor scenes (Silberman et al., 2012).

    Reads the pack that MTAN published (`Liu et al., 2019 <https://arxiv.org/abs/1803.10704>`_) and
    most of the field uses: 795 images for training and 654 for testing, 288 x 384 pixels, 13
    classes. Files are mapped into memory, not loaded; ``setup`` looks all of them over.

    A batch is ``(images, targets)``: images float32 ``[batch, 3, H, W]`` in [0, 1];
    ``targets["segmentation"]`` int64 ``[batch, H, W]``, -1 without a label; ``targets["depth"]``
    float32 ``[batch, 1, H, W]``, 0 without a label; ``targets["normals"]`` float32
    ``[batch, 3, H, W]``, unit vectors, zero without a label. The prediction loader yields the test
    images alone. The last, incomplete training batch is left out.

    The published code tests on the pack's folder ``val`` after every epoch and has no validation
    data. Here ``val`` is the test set, and ``val_fraction`` of the training images is for
    validation, so that nothing is ever chosen by test images. They are held out in runs of eight,
    since neighbours often show the same room. ``val_fraction=0`` trains on all, as published, and
    there is no validation.

    Augmentation is the published one, of training images only: :class:`RandomScaleCrop` (depth
    divided by the scale) and a horizontal flip of every second image (x of the normals negated). It
    draws from torch's global generator, so ``seed_everything`` governs it.

    Args:
        root: The folder with ``train`` and ``val`` in it.
        batch_size: Images in a batch (per process), at least 1; published 2.
        val_fraction: Share of the training images kept for validation, in [0, 1).
        seed: Seed of which images are kept, at least 0; of nothing else.
        augment: Whether training images are augmented.
        transform: What is done to training samples after that: any transform of
            ``torchvision.transforms.v2``, or a function from ``(image, targets)`` to the same, on
            :class:`torchvision.tv_tensors.Image`, :class:`Segmentation`, :class:`Depth` and
            :class:`Normals`.
        num_workers: Worker processes of every loader, at least 0.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Attributes:
        indices: After ``setup``, which files a split consists of, sorted int64: ``"train"`` and
            ``"val"`` number those of the folder ``train``, ``"test"`` those of ``val``.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> from lightning_flatmtl.data import NYUv2
        >>> data = NYUv2("data/nyuv2")
        >>> data.setup()  # doctest: +SKIP
        >>> images, targets = next(iter(data.train_dataloader()))  # doctest: +SKIP
    """

    what = "NYUv2"
    num_classes = 13
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "image": IMAGE,
        "segmentation": Quantity(("label",), channels=0, kinds="fiu"),
        "depth": DEPTH,
        "normals": NORMALS,
    }
    layout = LAYOUT
    sources = SOURCES

    def __init__(
        self,
        root: str = "data/nyuv2",
        *,
        batch_size: int = 2,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = True,
        transform: Callable[[Any], Any] | None = None,
        num_workers: int = 2,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            augment=augment,
            transform=transform,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
