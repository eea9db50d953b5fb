"""Two overlapping handwritten digits in one image: a multi-task benchmark without a download."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._pairs import TASKS, ImagePairs, PairModule
from lightning_flatmtl.data._splits import SPLITS, Split

__all__ = ["DigitPairs", "MultiDigits"]

DIGIT_SIZE = 8  # pixels, both ways, of scikit-learn's digits
DIGIT_MAX = 16.0  # their brightest grey value
CLASSES = 10


class DigitPairs(ImagePairs):
    """Pairs of digits, the first top-left and the second bottom-right, and where they came from.

    Where the two overlap, the brighter pixel wins, as in Multi-MNIST. Item ``i`` is
    ``(images[i], {"left": label, "right": label})``; the fields lie open for audits.

    Args:
        digits: Single digits, float ``[images, 8, 8]``, values in [0, 1].
        labels: Their classes, int64 ``[images]``.
        sources: Which two digits make a pair, int64 ``[pairs, 2]``, rows of ``digits``.
        canvas: Height and width of a composed image in pixels, in [8, 16].

    Attributes:
        images: Composed images, float32 ``[pairs, 1, canvas, canvas]``, values in [0, 1].
        targets: The labels to train with, int64 ``[pairs]`` per task; may carry noise.
        clean_targets: The true labels, int64 ``[pairs]`` per task.
        sources: As given.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.data import DigitPairs
        >>> digits = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
        >>> pairs = DigitPairs(digits, torch.tensor([3, 7]), torch.tensor([[0, 1]]), canvas=12)
        >>> image, target = pairs[0]
        >>> image.shape, image.sum().item()
        (torch.Size([1, 12, 12]), 64.0)
        >>> target["left"].item(), target["right"].item()
        (3, 7)
    """

    def __init__(self, digits: Tensor, labels: Tensor, sources: Tensor, canvas: int) -> None:
        self.sources = sources
        self.images = _compose(digits, sources, canvas)
        self.clean_targets = {task: labels[sources[:, k]] for k, task in enumerate(TASKS)}
        self.targets = dict(self.clean_targets)

    def add_label_noise(self, share: float, generator: torch.Generator) -> None:
        """Replace exactly ``round(share * pairs)`` labels of every task by a different class.

        Which pairs are hit and which of the nine other classes they get is drawn uniformly, for
        every task by itself. ``clean_targets`` keep the truth.

        Args:
            share: Share of wrong labels, in [0, 1).
            generator: Source of the draws.
        """
        wrong = round(share * len(self))
        for task, labels in self.clean_targets.items():
            hit = torch.randperm(len(self), generator=generator)[:wrong]
            shift = torch.randint(1, CLASSES, (wrong,), generator=generator)
            self.targets[task] = labels.clone()
            self.targets[task][hit] = (labels[hit] + shift) % CLASSES


class MultiDigits(PairModule[DigitPairs]):
    r"""Two tasks on pairs of handwritten digits: which one is top-left, which one bottom-right?

    Multi-MNIST in miniature (`Sabour et al., 2017 <https://arxiv.org/abs/1710.09829>`_), composed
    from the 1,797 real 8 x 8 digits that scikit-learn brings along, so nothing is downloaded. The
    two digits overlap by the pixelwise maximum; wrong training labels make memorising costly.

    The digits are split class by class before they are paired, so no source image appears in two
    of the train, validation and test splits. Validation and test labels are always clean. Split,
    pairs and noise depend on ``seed`` only and draw nothing from torch's global generator; the
    order of the training batches does, so ``seed_everything`` governs it.

    A batch is ``(images, {"left": labels, "right": labels})``: images float32
    ``[batch, 1, canvas, canvas]`` in [0, 1], labels int64 ``[batch]`` in 0..9. The prediction
    loader yields the test images alone, ``ood_dataloader`` images out of domain. The last,
    incomplete training batch is left out: every step then averages over equally many pairs, and
    batch normalisation never meets a batch of one.

    Args:
        train_pairs: Number of training pairs, at least ``batch_size``.
        val_pairs: Number of validation pairs, at least 1.
        test_pairs: Number of test pairs, at least 1.
        canvas: Height and width of an image in pixels, in [8, 16]. The digits share a square of
            ``16 - canvas`` pixels a side; at 8 they lie on top of each other and left cannot be
            told from right.
        label_noise: Share of wrong training labels per task, in [0, 1).
        batch_size: Pairs in a batch (per process), at least 1.
        seed: Seed of split, pairing and noise, at least 0; not of shuffling.
        val_fraction: Share of the source images kept for validation, in (0, 1).
        test_fraction: Share of the source images kept for testing, in (0, 1); with
            ``val_fraction`` below 1.
        num_workers: Worker processes of every loader, at least 0. The data lies in memory, so 0
            is usually the fastest.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Attributes:
        source_indices: After ``setup``, the rows of ``load_digits()`` that each split draws from,
            sorted int64 under ``"train"``, ``"val"``, ``"test"``. ``dataset(split).sources``
            holds the two rows of every single pair.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
        ValueError: If an argument is out of its bounds.

    Example:
        >>> from lightning_flatmtl.data import MultiDigits
        >>> data = MultiDigits(train_pairs=128, label_noise=0.3, batch_size=32)
        >>> data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, sorted(targets)
        (torch.Size([32, 1, 12, 12]), ['left', 'right'])
        >>> train = data.dataset("train")
        >>> (train.targets["left"] != train.clean_targets["left"]).sum().item()  # round(0.3 * 128)
        38
    """

    def __init__(
        self,
        train_pairs: int = 3000,
        val_pairs: int = 1000,
        test_pairs: int = 2000,
        canvas: int = 12,
        label_noise: float = 0.0,
        *,
        batch_size: int = 64,
        seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.3,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        pairs: dict[Split, int] = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        super().__init__(pairs, batch_size, seed, num_workers, pin_memory)
        _require_sklearn()
        check(DIGIT_SIZE <= canvas <= 2 * DIGIT_SIZE, "canvas", "in [8, 16]", canvas)
        check(0 <= label_noise < 1, "label_noise", "in [0, 1)", label_noise)
        check(0 < val_fraction < 1, "val_fraction", "in (0, 1)", val_fraction)
        check(0 < test_fraction < 1, "test_fraction", "in (0, 1)", test_fraction)
        together = val_fraction + test_fraction
        check(together < 1, "val_fraction + test_fraction", "below 1", together)
        self.canvas, self.label_noise = canvas, label_noise
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.source_indices: dict[Split, Tensor] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Split, pair and add noise; a second call, whatever its stage, changes nothing."""
        if self._datasets:
            return
        digits, labels = _load_digits()
        self.source_indices = self._split(labels)
        for split in SPLITS:
            sources = self._draw_pairs(split)
            self._datasets[split] = DigitPairs(digits, labels, sources, self.canvas)
        self._datasets["train"].add_label_noise(self.label_noise, self.generator("noise"))

    def _split(self, labels: Tensor) -> dict[Split, Tensor]:
        """Deal the source images out to the splits, class by class."""
        generator = self.generator("split")
        dealt: dict[Split, list[Tensor]] = {"train": [], "val": [], "test": []}
        for label in range(CLASSES):
            images = (labels == label).nonzero().flatten()
            images = images[torch.randperm(len(images), generator=generator)]
            val, test = (round(f * len(images)) for f in (self.val_fraction, self.test_fraction))
            sizes = [len(images) - val - test, val, test]
            if min(sizes) < 1:
                raise ValueError(
                    "`val_fraction` and `test_fraction` must leave every split an image of each "
                    f"class, got {self.val_fraction} and {self.test_fraction}."
                )
            for part, chosen in zip(dealt.values(), torch.split(images, sizes), strict=True):
                part.append(chosen)
        return {split: torch.cat(parts).sort().values for split, parts in dealt.items()}

    def _draw_pairs(self, split: Split) -> Tensor:
        """Draw the two source images of every pair, uniformly and with replacement."""
        images = self.source_indices[split]
        size = (self.pairs[split], len(TASKS))
        return images[torch.randint(len(images), size, generator=self.generator(split))]


def _compose(digits: Tensor, sources: Tensor, canvas: int) -> Tensor:
    """Put digits ``sources[:, 0]`` top-left, ``sources[:, 1]`` bottom-right; the brighter wins."""
    images = torch.zeros(len(sources), 1, canvas, canvas)
    images[:, 0, :DIGIT_SIZE, :DIGIT_SIZE] = digits[sources[:, 0]]
    corner = images[:, 0, -DIGIT_SIZE:, -DIGIT_SIZE:]
    torch.maximum(corner, digits[sources[:, 1]], out=corner)
    return images


def _load_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, float32 ``[1797, 8, 8]`` in [0, 1], and their classes."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional dependency

    bunch = load_digits()
    digits = torch.as_tensor(bunch.images, dtype=torch.float32) / DIGIT_MAX
    return digits, torch.as_tensor(bunch.target, dtype=torch.int64)


def _require_sklearn() -> None:
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            "`MultiDigits` needs scikit-learn, which is not installed: "
            'run `pip install "lightning-flatmtl[digits]"`.'
        )
