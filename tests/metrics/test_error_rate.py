"""Error rates against NumPy in float64."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import ClassificationTask
from lightning_flatmtl.functional import wrong_predictions
from lightning_flatmtl.metrics import ErrorRate, MeanErrorRate

MISSING = -1
KINDS = {"binary": (), "multiclass": (4,), "images": (3, 5, 2)}


def batches(kind: str, seed: int = 0):
    """Batches of several sizes, a fifth of the labels missing."""
    g = torch.Generator().manual_seed(seed)
    for n in (7, 1, 16):
        z = torch.randn(n, *KINDS[kind], generator=g)
        classes = 2 if kind == "binary" else KINDS[kind][0]
        y = torch.randint(0, classes, (n, *KINDS[kind][1:]), generator=g)
        y[torch.rand(y.shape, generator=g) < 0.2] = MISSING
        yield z, y


def by_numpy(logits: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Wrong and counted labels, one after the other."""
    wrong, count = 0.0, 0.0
    binary = logits.shape == target.shape
    for place in np.ndindex(target.shape):
        label = target[place]
        if label == MISSING:
            continue
        found = logits[place] if binary else logits[(place[0], slice(None), *place[1:])]
        said = int(found > 0) if binary else int(np.argmax(found))
        bad = bool(np.isnan(found).any()) or said != label
        wrong, count = wrong + bad, count + 1
    return wrong, count


def share(wrong: float, count: float) -> float:
    return wrong / count if count else float("nan")


def mean_by_numpy(logits: np.ndarray, target: np.ndarray) -> float:
    shares = [
        share(*by_numpy(logits[..., task], target[:, task])) for task in range(target.shape[1])
    ]
    known = [s for s in shares if not np.isnan(s)]
    return float(np.mean(known)) if known else float("nan")


# --- one task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_is_numpys(kind) -> None:
    metric = ErrorRate(missing=MISSING)
    counts = []
    for z, y in batches(kind):
        metric.update(z, y)
        counts.append(by_numpy(z.double().numpy(), y.numpy()))
    expected = share(*map(sum, zip(*counts, strict=True)))
    assert metric.compute().item() == expected
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_precision(logits) -> None:
    ((z, y), *_) = batches("multiclass")
    z = z.to(logits)
    wrong, count = by_numpy(z.double().numpy(), y.numpy())
    metric = ErrorRate(missing=MISSING)
    metric.update(z, y)
    assert metric.compute().item() == wrong / count


def test_it_is_one_minus_torchmetrics_accuracy() -> None:
    accuracy, error = MulticlassAccuracy(4, average="micro"), ErrorRate()
    for z, y in batches("multiclass"):
        accuracy.update(z, y.clamp(0))
        error.update(z, y.clamp(0))
    assert error.compute().item() == pytest.approx(1 - accuracy.compute().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([1.0, 2.0], [1, 1], 0.0),  # one class only
        ([1.0, 2.0], [0, 0], 1.0),
        ([0.0, 0.0], [0, 1], 0.5),  # a tie is class 0
        ([[1.0, 1.0], [1.0, 1.0]], [0, 1], 0.5),
        ([float("nan"), 1.0], [0, 1], 0.5),
        ([[float("nan"), 1.0], [0.0, 1.0]], [1, 1], 0.5),
        ([float("inf"), -float("inf")], [1, 0], 0.0),
        ([[float("inf"), 0.0], [0.0, -float("inf")]], [0, 0], 0.0),
        ([1.0, 2.0], [MISSING, MISSING], float("nan")),  # nothing is labelled
        ([1.0, 2.0], [MISSING, 1], 0.0),
    ],
)
def test_awkward_labels_and_logits(logits, target, expected) -> None:
    metric = ErrorRate(missing=MISSING)
    metric.update(torch.tensor(logits), torch.tensor(target))
    assert metric.compute().item() == pytest.approx(expected, nan_ok=True)


def test_more_samples_than_float32_can_count() -> None:
    metric = ErrorRate()
    metric.update(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
    metric.wrong, metric.count = torch.tensor(2**53 - 1), torch.tensor(2**53)
    metric.update(torch.tensor([1.0]), torch.tensor([0]))
    assert (metric.wrong.item(), metric.count.item()) == (2**53, 2**53 + 1)


# --- many tasks ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), samples=st.integers(0, 6), tasks=st.integers(1, 4), classes=st.booleans())
def test_the_mean_is_numpys(data, samples, tasks, classes) -> None:
    """Ties, tasks of one class, tasks never labelled: small numbers have them all."""
    numbers = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 2.0])
    shape = (samples, 2, tasks) if classes else (samples, tasks)
    flat = data.draw(st.lists(numbers, min_size=(n := int(np.prod(shape))), max_size=n))
    labels = data.draw(
        st.lists(
            st.sampled_from([-1, -1, 0, 1]), min_size=samples * tasks, max_size=samples * tasks
        )
    )
    z = torch.tensor(flat).reshape(shape)
    y = torch.tensor(labels, dtype=torch.int64).reshape(samples, tasks)
    metric = MeanErrorRate(tasks, missing=MISSING)
    for part in (slice(0, samples // 2), slice(samples // 2, None)):
        metric.update(z[part], y[part])
    expected = mean_by_numpy(z.double().numpy(), y.numpy())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-15, nan_ok=True)


def test_names_and_columns_say_the_same() -> None:
    g = torch.Generator().manual_seed(3)
    names = ["a", "b", "c"]
    columns, named = MeanErrorRate(3, MISSING), MeanErrorRate(names, MISSING)
    for n in (5, 9):
        z, y = torch.randn(n, 2, 3, generator=g), torch.randint(-1, 2, (n, 3), generator=g)
        columns.update(z, y)
        named.update(
            {k: z[..., i] for i, k in enumerate(names)}, {k: y[:, i] for i, k in enumerate(names)}
        )
    assert torch.equal(columns.by_task, named.by_task)
    assert torch.equal(columns.compute(), named.compute())


def test_every_task_weighs_the_same_and_one_without_labels_nothing() -> None:
    metric = MeanErrorRate(["often", "seldom", "never"], missing=MISSING)
    metric.update({"often": torch.ones(100)}, {"often": torch.ones(100, dtype=torch.int64)})
    metric.update({"seldom": torch.ones(1)}, {"seldom": torch.zeros(1, dtype=torch.int64)})
    assert metric.compute().item() == 0.5
    assert metric.by_task[:2].tolist() == [0, 1]
    assert metric.by_task[2].isnan()


# --- metrics like others -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ErrorRate, lambda: MeanErrorRate(3)])
def test_they_are_metrics_like_others(make) -> None:
    metric = make()
    shape = (6,) if isinstance(metric, ErrorRate) else (6, 3)
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(shape, generator=g), torch.randint(0, 2, shape, generator=g)
    first = metric(z, y)
    assert 0 < first < 1
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), first)
    assert torch.equal(copy.deepcopy(metric).compute(), first)
    assert not metric.state_dict()
    metric.reset()
    metric.update(z[:0], y[:0])
    assert metric.compute().isnan()
    assert metric.higher_is_better is False
    collection = MetricCollection({"x": make(), "y": make()})
    collection.update(z, y)
    collection.update(z, y)
    assert torch.equal(collection.compute()["y"], first)


def test_a_classification_task_has_it_in_the_place_of_accuracy() -> None:
    task = ClassificationTask("a", in_features=4, num_classes=2, metric="error_rate")
    assert isinstance(task.metrics["error_rate"], ErrorRate)
    assert list(ClassificationTask("a", in_features=4, num_classes=2).metrics) == ["accuracy"]
    with pytest.raises(ValueError, match="`metric` must be 'accuracy' or 'error_rate', got 'f1'"):
        ClassificationTask("a", in_features=4, num_classes=2, metric="f1")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [0, -2, True, []])
def test_bad_tasks_are_refused(tasks) -> None:
    with pytest.raises(ValueError, match="`tasks` must be a number >= 1 or names of tasks, got"):
        MeanErrorRate(tasks)


def test_bad_input_is_refused() -> None:
    ones = torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="must have different names"):
        MeanErrorRate(["a", "a"])
    with pytest.raises(ValueError, match=r"got \[4, 1\] and \[4\]"):
        wrong_predictions(torch.zeros(4, 1), ones)
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[5\]"):
        ErrorRate().update(torch.zeros(4, 3), torch.zeros(5))
    with pytest.raises(ValueError, match=r"tensor \[n, 2\], a column a task, got \[4\]"):
        MeanErrorRate(2).update(torch.zeros(4), ones)
    with pytest.raises(ValueError, match="got dict. Give names of `tasks` for mappings"):
        MeanErrorRate(2).update({}, {})
    named = MeanErrorRate(["a", "b"])
    with pytest.raises(ValueError, match=r"got \['a'\] and \['b'\]"):
        named.update({"a": ones}, {"b": ones})
    with pytest.raises(ValueError, match=r"got \['c'\] and \['c'\]"):
        named.update({"c": ones}, {"c": ones})
    with pytest.raises(ValueError, match="got Tensor and Tensor"):
        named.update(ones, ones)
    named.update({"a": ones.float()}, {"a": ones})
    with pytest.raises(ValueError, match=r"\[2\] and \[4\]"):  # and nothing of it is counted
        named.update({"a": ones.float(), "b": torch.ones(2)}, {"a": ones, "b": ones})
    assert named.count.tolist() == [4, 0]
