"""AUROC of binary logits against independent counts, and the task that has it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC

from lightning_flatmtl import BinaryTask
from lightning_flatmtl.functional import auroc
from lightning_flatmtl.metrics import ErrorRate, LogitAUROC


def pairs(scores, labels) -> float:
    """Every pair of a positive and a negative one, by itself."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def samples(kind: str, n: int = 60):
    g = torch.Generator().manual_seed(0)
    z, y = 3 * torch.randn(n, generator=g), torch.randint(0, 2, (n,), generator=g)
    if kind == "ties":
        z = z.round()
    elif kind == "equal":
        z = torch.zeros(n)
    elif kind == "huge":
        z = z * 1e30
    elif kind == "tiny":
        z = 1 + z * 1e-7
    elif kind == "half":
        z = z.bfloat16()
    elif kind == "rare":
        y = torch.zeros(n, dtype=torch.int64)
        y[7] = 1
    elif kind == "perfect":
        z = (2 * y - 1.0) * (1 + z.abs())
    return z, y


KINDS = ["random", "ties", "equal", "huge", "tiny", "half", "rare", "perfect"]


@pytest.mark.parametrize("kind", KINDS)
def test_auroc_is_the_share_of_pairs(kind) -> None:
    z, y = samples(kind)
    expected = pairs(z.double(), y)
    assert auroc(z, y).item() == pytest.approx(expected, abs=1e-14)
    assert auroc(-z, y).item() == pytest.approx(1 - expected, abs=1e-14)
    metric = LogitAUROC()
    for part in (slice(0, 1), slice(1, 20), slice(20, 60)):
        metric.update(z[part], y[part].float())
    assert metric.compute().item() == pytest.approx(expected, abs=1e-14)
    assert roc_auc_score(y, z.double()) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_that_of_torchmetrics_where_that_sees_probabilities() -> None:
    z, y = samples("random", 3000)
    assert auroc(z, y).item() == pytest.approx(BinaryAUROC()(z.sigmoid(), y).item(), abs=1e-5)


def test_logits_of_a_batch_within_0_and_1_are_no_probabilities() -> None:
    z, y = torch.tensor([0.9, 0.1, -3.0, 0.6]), torch.tensor([1, 0, 0, 0])
    ours, theirs = LogitAUROC(), BinaryAUROC()
    for metric in (ours, theirs):
        metric.update(z[:2], y[:2])
        metric.update(z[2:], y[2:])
    assert ours.compute().item() == 1
    z, y = torch.tensor([0.6, 0.1, -3.0, 0.7]), torch.tensor([1, 0, 0, 1])
    ours, theirs = LogitAUROC(), BinaryAUROC()
    for metric in (ours, theirs):
        metric.update(z[:2], y[:2])
        metric.update(z[2:], y[2:])
    assert ours.compute().item() == 1


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_only_has_no_auroc(labels) -> None:
    y = torch.tensor(labels)
    assert auroc(torch.arange(len(labels)) + 0.0, y).isnan()
    metric = LogitAUROC()
    metric.update(torch.zeros(len(labels)), y)
    assert metric.compute().isnan()


def test_nan_is_not_ranked() -> None:
    assert auroc(torch.tensor([0.0, float("nan")]), torch.tensor([0, 1])).isnan()


def test_it_is_a_metric_like_others() -> None:
    z, y = samples("random")
    metric = LogitAUROC()
    first = metric(z, y)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), first)
    assert torch.equal(copy.deepcopy(metric).compute(), first)
    assert torch.equal(metric.clone().compute(), first)
    assert not metric.state_dict()
    metric.reset()
    metric.update(z.view(6, 10), y.view(6, 10))
    assert torch.equal(metric.compute(), first)
    metric.reset()
    metric.update(z[:0], y[:0])
    assert metric.compute().isnan()
    assert metric.higher_is_better is True
    with pytest.raises(ValueError, match=r"got \[4, 1\] and \[4\]"):
        metric.update(torch.zeros(4, 1), torch.zeros(4))


def test_auroc_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got \[3\] and \[2\]"):
        auroc(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_binary_task(dtype) -> None:
    z, y = samples("random")
    task = BinaryTask("income", in_features=4)
    assert task.head(torch.zeros(60, 4)).shape == y.shape
    p = z.double().sigmoid()
    expected = -torch.where(y == 1, p, 1 - p).log().mean().item()
    assert task.loss(z, y.to(dtype)).item() == pytest.approx(expected, abs=1e-6)


def test_a_binary_task_without_some_labels() -> None:
    task = BinaryTask("income", in_features=4, metrics={"error": ErrorRate()}, missing=-1)
    assert list(task.metrics) == ["error"]
    labelled = task.labelled(torch.arange(4.0), torch.tensor([1, -1, 0, -1]))
    assert [part.tolist() for part in labelled] == [[0, 2], [1, 0]]
