"""The images of a pack with their targets, as a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import override

from lightning_flatmtl.data.dense.pack import Pack
from lightning_flatmtl.data.dense.targets import Depth, Normals, Segmentation

__all__ = ["DenseImages", "Sample", "Transform"]

Sample = tuple[Tensor, dict[str, Tensor]]
Transform = Callable[[Sample], Sample]

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {"depth": Depth, "normals": Normals}


class DenseImages(Dataset[Sample]):
    """Images of a pack and their targets.

    A transform gets ``(image, {task: target})`` as tv_tensors; what comes out are plain tensors.

    Args:
        pack: Where to read.
        rows: Which images of the pack.
        tasks: The targets to read.
        classes: Number of classes of ``"segmentation"``.
        transform: What is done to every sample.
    """

    def __init__(
        self,
        pack: Pack,
        rows: Sequence[int],
        tasks: Sequence[str],
        classes: int,
        transform: Transform | None = None,
    ) -> None:
        self._pack, self._rows, self._tasks, self._classes = pack, rows, tasks, classes
        self._transform = transform
        self._plain = v2.ToPureTensor()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        """An image as it is on disk, float32 ``[3, H, W]``."""
        return self._pack.read("image", self._rows[index])

    @override
    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        image: Tensor = tv_tensors.Image(self.image(index))
        sample = (image, {task: self._target(task, row) for task in self._tasks})
        if self._transform is not None:
            sample = self._transform(sample)
        plain: Sample = self._plain(sample)
        return plain

    def _target(self, task: str, row: int) -> Tensor:
        if task == "segmentation":
            return Segmentation(self._pack.read_labels(task, row, self._classes))
        return TARGETS[task](self._pack.read(task, row))


class ImagesAlone(Dataset[Any]):
    """The same images without targets, for prediction."""

    def __init__(self, images: DenseImages) -> None:
        self._images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    @override
    def __getitem__(self, index: int) -> Tensor:
        return self._images.image(index)
