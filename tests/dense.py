"""Predictions and labels of images, random and awkward, and what NumPy makes of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CLASSES = 5
Batches = Sequence[tuple[Tensor, Tensor]]


def segmentations() -> dict[str, Batches]:
    """Logits and classes; -1 has no label."""
    g = torch.Generator().manual_seed(0)

    def batch(n: int, among: Sequence[int] = range(CLASSES), ignored: float = 0.2):
        logits = torch.randn(n, CLASSES, 6, 7, generator=g)
        target = torch.tensor(list(among))[torch.randint(len(among), (n, 6, 7), generator=g)]
        target[torch.rand(n, 6, 7, generator=g) < ignored] = -1
        return logits, target

    sure = batch(2, [3])
    sure[0][:, 3] += 100
    some = batch(3)
    some[1][1] = -1  # one image of the three has no label at all
    only_zero = batch(2, [0])
    only_zero[0][:, 3:] -= 100  # neither predicted nor labelled
    return {
        "random": [batch(3), batch(1), batch(4)],
        "predicted, not labelled": [batch(2, [0, 2]), batch(2, [0, 4])],
        "absent": [only_zero],
        "one class only": [sure],
        "an image without labels": [some, batch(2)],
        "a batch without labels": [batch(2), batch(2, ignored=2.0)],
        "all labelled": [batch(2, ignored=0.0)],
    }


def depths() -> dict[str, Batches]:
    """Predictions and depths; 0 has no label."""
    g = torch.Generator().manual_seed(1)

    def batch(n: int, unlabelled: float = 0.3, scale: float = 1.0):
        target = scale * (torch.rand(n, 1, 6, 7, generator=g) + 0.01)
        predictions = target + scale * torch.randn(n, 1, 6, 7, generator=g)
        target[torch.rand(n, 1, 6, 7, generator=g) < unlabelled] = 0
        return predictions, target

    invalid = batch(2)
    invalid[1][0, 0, 0, :4] = torch.tensor([-1.0, float("nan"), float("inf"), -0.0])
    invalid[0][0, 0, 0, 0] = 1e30
    exact = batch(2)
    return {
        "random": [batch(3), batch(1), batch(4)],
        "unequal shares": [batch(2, 0.95), batch(2, 0.0)],
        "invalid": [invalid],
        "a batch without labels": [batch(2), batch(2, 2.0)],
        "tiny": [batch(2, scale=1e-20), batch(2, scale=1e-6)],
        "one pixel": [(torch.tensor([[[[3.0]]]]), torch.tensor([[[[2.0]]]]))],
        "exact": [(exact[1], exact[1])],
    }


def normals() -> dict[str, Batches]:
    """Predictions and normals; the zero vector has no label."""
    g = torch.Generator().manual_seed(2)

    def batch(n: int, unlabelled: float = 0.3, noise: float = 1.0):
        target = torch.nn.functional.normalize(torch.randn(n, 3, 6, 7, generator=g), dim=1)
        predictions = target + noise * torch.randn(n, 3, 6, 7, generator=g)
        lacking = torch.rand(n, 1, 6, 7, generator=g) < unlabelled
        return predictions, target.masked_fill(lacking, 0.0)

    zero = batch(2)
    zero[0][0] = 0
    sum_zero = batch(2)
    sum_zero[1][0] = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    broken = batch(2)
    broken[1][0, 1] = float("nan")
    same, opposite = batch(2), batch(2)
    lengths = batch(2)
    axes = torch.eye(3).view(3, 3, 1)
    return {
        "random": [batch(3), batch(1, noise=0.1), batch(4, noise=0.01)],
        "zero predictions": [zero, batch(2)],
        "components that sum up to 0": [sum_zero],
        "targets that are not finite": [broken],
        "same": [(same[1] * 3, same[1])],
        "opposite": [(-opposite[1], opposite[1])],
        "lengths": [(lengths[0] * 1e-12, lengths[1] * 1e12)],
        "a batch without labels": [batch(2), batch(2, 2.0)],
        "close": [batch(2, noise=1e-6)],
        "axes": [(axes, axes.roll(1, 0)), (axes, axes)],
        "one pixel": [(axes[:1], axes[1:2])],
    }


def confusion(batches: Batches) -> np.ndarray:
    """Rows are labels, columns predictions."""
    matrix = np.zeros((CLASSES, CLASSES))
    for logits, target in batches:
        found, labels = logits.numpy().argmax(1).ravel(), target.numpy().ravel()
        np.add.at(matrix, (labels[labels >= 0], found[labels >= 0]), 1)
    return matrix


def mean_iou(batches: Batches) -> float:
    """As the published confusion matrix has it, over the classes that are anywhere at all."""
    matrix = confusion(batches)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return float((matrix.diagonal()[union > 0] / union[union > 0]).mean())


def pixel_accuracy(batches: Batches) -> float:
    matrix = confusion(batches)
    return float(matrix.trace() / matrix.sum())


def depth_errors(batches: Batches) -> tuple[float, float]:
    p, t = (np.concatenate([b[i].double().numpy().ravel() for b in batches]) for i in (0, 1))
    keep = np.isfinite(t) & (t > 0)
    errors = np.abs(p[keep] - t[keep])
    return float(errors.mean()), float((errors / t[keep]).mean())


def angles(batches: Batches) -> np.ndarray:
    """In degrees, by the arc cosine of longdouble cosines; zero predictions are at 90 degrees."""
    found = []
    for batch in batches:
        p, t = (np.moveaxis(x.numpy().astype(np.longdouble), 1, -1).reshape(-1, 3) for x in batch)
        keep = np.isfinite(t).all(1) & (np.abs(t).sum(1) > 0)
        p, t = p[keep], t[keep]
        lengths = np.sqrt((p**2).sum(1) * (t**2).sum(1))
        cosines = np.divide(
            (p * t).sum(1), lengths, out=np.zeros(len(p), p.dtype), where=lengths > 0
        )
        found.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))).astype(np.float64))
    return np.concatenate(found)
