"""Losses over labelled pixels: values by NumPy, gradients, and nothing where there is no label."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from lightning_flatmtl.functional import (
    angle_histogram,
    depth_loss,
    histogram_median,
    normals_loss,
    segmentation_loss,
)
from tests.dense import angles, depth_errors, depths, normals, segmentations

NO_LABEL = {
    segmentation_loss: (torch.randn(2, 5, 3, 4), torch.full((2, 3, 4), -1)),
    depth_loss: (torch.randn(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)),
    normals_loss: (torch.randn(2, 3, 3, 4), torch.zeros(2, 3, 3, 4)),
}


@pytest.mark.parametrize("kind", depths())
def test_depth_is_the_absolute_error(kind) -> None:
    for batch in depths()[kind]:
        if (batch[1] > 0).any():
            expected, _ = depth_errors([batch])
            assert float(depth_loss(*batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", normals())
def test_normals_are_one_minus_the_mean_cosine(kind) -> None:
    for batch in normals()[kind]:
        found = angles([batch])
        if len(found):
            expected = 1 - np.cos(np.radians(found)).mean()
            assert float(normals_loss(*batch)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", segmentations())
def test_segmentation_is_the_cross_entropy(kind) -> None:
    for logits, target in segmentations()[kind]:
        if (target >= 0).any():
            expected = cross_entropy(logits.double(), target, ignore_index=-1)
            assert float(segmentation_loss(logits, target)) == pytest.approx(
                float(expected), rel=1e-5
            )


@pytest.mark.parametrize("loss", NO_LABEL)
def test_without_labels_loss_and_gradient_are_0(loss) -> None:
    predictions, target = NO_LABEL[loss]
    predictions = predictions.clone().requires_grad_()
    value = loss(predictions, target)
    value.backward()
    assert value.item() == 0
    assert torch.equal(predictions.grad, torch.zeros_like(predictions))


@pytest.mark.parametrize("loss", NO_LABEL)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_do_not_overflow(loss, kind) -> None:
    images = torch.ones(1, 3 if loss is normals_loss else 1, 300, 300)
    if loss is segmentation_loss:
        value = loss(torch.zeros(1, 5, 300, 300, dtype=kind), images[:, 0].long())
        assert value.item() == pytest.approx(np.log(5))
    else:
        value = loss(-images.to(kind), images.to(kind))
        assert value.item() == pytest.approx(2.0)
    assert value.dtype == torch.float32


def test_gradients() -> None:
    p = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    t[0, :, 0, 0] = 0
    assert gradcheck(normals_loss, (p, t))
    assert gradcheck(depth_loss, (p, t + 3))


def test_a_prediction_of_0_has_a_gradient_of_0() -> None:
    p = torch.randn(2, 3, 2, 2)
    p[0, :, 1, 1] = 0
    p.requires_grad_()
    loss = normals_loss(p, torch.ones(2, 3, 2, 2))
    loss.backward()
    assert p.grad.isfinite().all()
    assert (p.grad[0, :, 1, 1] == 0).all()
    assert (p.grad[1] != 0).any()


def test_unlabelled_pixels_have_no_gradient() -> None:
    p = torch.randn(1, 3, 2, 2, requires_grad=True)
    t = torch.ones(1, 3, 2, 2)
    t[..., 0, :], t[0, 0, 1, 0] = 0, torch.nan
    normals_loss(p, t).backward()
    depth_loss(p, t).backward()
    assert (p.grad[..., 0, :] == 0).all()
    assert p.grad.isfinite().all()
    assert (p.grad[..., 1, 1] != 0).any()


@pytest.mark.parametrize("loss", [depth_loss, normals_loss])
def test_shapes_that_would_be_broadcast_are_refused(loss) -> None:
    with pytest.raises(ValueError, match="must have the same shape"):
        loss(torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 4))


def test_every_edge_of_the_bins() -> None:
    """Each edge belongs to the bin that begins there, whatever a product would round to."""
    edges = torch.arange(18000, dtype=torch.float64) / 100
    assert torch.equal(angle_histogram(edges), torch.ones(18000, dtype=torch.int64))
    below = torch.nextafter(edges[1:], torch.zeros(()).double())
    assert torch.equal(angle_histogram(below)[:-1], torch.ones(17999, dtype=torch.int64))


def test_the_median_of_a_histogram() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 1000, 100_001):
        found = 180 * torch.rand(n, generator=g, dtype=torch.float64) ** 3
        median = histogram_median(angle_histogram(found))
        assert abs(float(median) - np.median(found)) <= 0.005 + 1e-12
    assert histogram_median(torch.zeros(18000, dtype=torch.int64)).isnan()
