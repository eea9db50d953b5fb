"""The metrics on sums against torchmetrics' and against all samples at once."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from lightning_flatmtl.functional import brier_scores, predictive_entropy
from lightning_flatmtl.metrics import BrierScore, ExpectedCalibrationError, PredictiveEntropy

KINDS = {"multiclass": (4,), "binary": (), "images": (4, 3, 2), "labels": (6,)}


def batches(kind: str, count: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    for n in [7, 16, 30][:count]:
        z = 2 * torch.randn(n, *KINDS[kind], generator=g)
        if kind in {"multiclass", "images"}:
            yield z, torch.randint(0, 4, (n, *KINDS[kind][1:]), generator=g)
        else:
            yield z, torch.randint(0, 2, z.shape, generator=g)


def flat(kind: str):
    parts = list(batches(kind))
    if kind in {"multiclass", "images"}:
        z = torch.cat([z.movedim(1, -1).reshape(-1, 4) for z, _ in parts])
    else:
        z = torch.cat([z.flatten() for z, _ in parts])
    return z, torch.cat([y.flatten() for _, y in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_bins", [5, 10, 15])
def test_the_error_is_that_of_torchmetrics(kind, n_bins) -> None:
    metric = ExpectedCalibrationError(n_bins)
    for z, y in batches(kind):
        metric.update(z, y)
    z, y = flat(kind)
    if z.ndim == 2:
        theirs = MulticlassCalibrationError(4, n_bins=n_bins)(z.softmax(1), y)
    else:
        theirs = BinaryCalibrationError(n_bins=n_bins)(z.sigmoid(), y)
    assert metric.compute().item() == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_all_samples(kind) -> None:
    brier, entropy = BrierScore(), PredictiveEntropy(n_bins=8)
    for z, y in batches(kind):
        brier.update(z, y)
        entropy.update(z, y)
    z, y = flat(kind)
    p = z.double().softmax(1) if z.ndim == 2 else z.double().sigmoid()
    torch.testing.assert_close(brier.compute(), brier_scores(p, y).mean())
    torch.testing.assert_close(entropy.compute(), predictive_entropy(z.double()).mean())
    assert entropy.histogram.sum().item() == len(z)


def test_logits_within_0_and_1_are_no_probabilities() -> None:
    z, y = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
    assert ExpectedCalibrationError()(z, y).item() == pytest.approx(0.25)
    assert ExpectedCalibrationError()(z[:, 0], y).item() == pytest.approx(0.25)


def test_the_histogram_reaches_the_logarithm_of_the_classes() -> None:
    metric = PredictiveEntropy(n_bins=4)
    metric.update(torch.tensor([[0.0] * 5, [99.0, 0, 0, 0, 0]]))
    metric.update(torch.zeros(2, 5))
    assert metric.histogram.tolist() == [1, 0, 0, 3]


@pytest.mark.parametrize("kind", [ExpectedCalibrationError, BrierScore, PredictiveEntropy])
def test_they_are_metrics_like_others(kind) -> None:
    (z, y), *_ = batches("multiclass")
    metric = kind()
    first = metric(z, y)
    again = pickle.loads(pickle.dumps(metric))
    assert torch.equal(again.compute(), first)
    assert torch.equal(copy.deepcopy(metric).compute(), first)
    assert not metric.state_dict()
    metric.reset()
    metric.update(z[:0], y[:0])
    assert metric.compute().isnan()
    assert metric.higher_is_better is (None if kind is PredictiveEntropy else False)
    collection = MetricCollection({"x": kind()})
    collection.update(z, y)
    assert torch.equal(collection.compute()["x"], first)


@pytest.mark.parametrize("n_bins", [0, True, 2.5])
@pytest.mark.parametrize("kind", [ExpectedCalibrationError, PredictiveEntropy])
def test_bad_numbers_of_bins_are_refused(kind, n_bins) -> None:
    with pytest.raises(ValueError, match="`n_bins` must be an integer >= 1, got"):
        kind(n_bins)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[5\]"):
        ExpectedCalibrationError().update(torch.zeros(4, 3), torch.zeros(5))
    with pytest.raises(ValueError, match=r"got \[4, 1\] and \[4\]"):
        BrierScore().update(torch.zeros(4, 1), torch.zeros(4))
