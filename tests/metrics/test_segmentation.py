"""Mean IoU and pixel accuracy are torchmetrics' own; they are what the published ones are."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_flatmtl.task import SegmentationTask
from tests.dense import CLASSES, confusion, mean_iou, pixel_accuracy, segmentations

SEGMENTATIONS = segmentations()


def metrics() -> MetricCollection:
    return MetricCollection(SegmentationTask("s", CLASSES, in_channels=4).metrics)


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_they_are_those_of_one_confusion_matrix(kind) -> None:
    found = metrics()
    for batch in SEGMENTATIONS[kind]:
        found.update(*batch)
    values = found.compute()
    assert float(values["miou"]) == pytest.approx(mean_iou(SEGMENTATIONS[kind]), rel=1e-6)
    accuracy = pixel_accuracy(SEGMENTATIONS[kind])
    assert float(values["pixel_accuracy"]) == pytest.approx(accuracy, rel=1e-6)


def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_predicted_counts() -> None:
    """The published quotient is 0 / 0 in the one case, and 0 in the other."""
    absent = confusion(SEGMENTATIONS["absent"])
    assert absent[:, 3:].sum() == absent[1:].sum() == 0
    predicted = confusion(SEGMENTATIONS["predicted, not labelled"])
    assert predicted[1].sum() == 0 < predicted[:, 1].sum()


def test_without_any_label() -> None:
    """Such a batch does not come as far as the metrics; this is what torchmetrics makes of it."""
    found = metrics()
    found.update(torch.randn(2, CLASSES, 3, 3), torch.full((2, 3, 3), -1))
    values = found.compute()
    assert math.isnan(values["miou"])
    assert values["pixel_accuracy"] == 0


def test_millions_of_pixels() -> None:
    """More than float32 counts by one, as many as the matrix of an epoch has."""
    found = metrics()
    right = torch.eye(CLASSES)[torch.zeros(1, 3, 3, dtype=torch.int64)].movedim(-1, 1)
    found.update(right, torch.zeros(1, 3, 3, dtype=torch.int64))
    matrix = torch.full((CLASSES, CLASSES), 3, dtype=torch.int64)
    matrix += torch.eye(CLASSES, dtype=torch.int64) * 72_000_001
    found["miou"].confmat = matrix
    union = 72_000_004 + 2 * 3 * (CLASSES - 1)
    assert float(found["miou"].compute()) == pytest.approx(72_000_004 / union, rel=1e-6)
