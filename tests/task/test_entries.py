"""Multi-label, regression and tagging tasks: exact against loops, entries without a label."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import (
    ClassificationTask,
    MultiLabelTask,
    MultiTaskModule,
    RegressionTask,
    TaggingTask,
    TaskSAM,
)
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.metrics import MacroF1
from tests.helpers import Pairs, assert_close, fit, sgd, trainer

NAN = float("nan")
N = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    """0, 1 and missing; the last sample has none at all."""
    found = torch.tensor([[0, 1, -1], [1, 1, 1], [-1, -1, 0], [0, 0, 1], [1, -1, 0], [-1, -1, -1]])
    return found.double()


def by_loops(loss: Any, predictions: Tensor, target: Tensor, missing: float) -> float:
    means = []
    for row, wanted in zip(predictions, target, strict=True):
        kept = [
            loss(p.item(), y.item())
            for p, y in zip(row.flatten(), wanted.flatten(), strict=True)
            if y.item() != missing and not y.isnan()
        ]
        if kept:
            means.append(sum(kept) / len(kept))
    return sum(means) / len(means)


def log_loss(z: float, y: float) -> float:
    return math.log1p(math.exp(-z)) if y else math.log1p(math.exp(z))


LOSSES = {
    "mse": lambda p, y: (p - y) ** 2,
    "l1": lambda p, y: abs(p - y),
    "huber": lambda p, y: (p - y) ** 2 / 2 if abs(p - y) < 1 else abs(p - y) - 0.5,
}


@pytest.mark.parametrize("missing", [-1, NAN])
def test_multi_label_loss_and_f1(missing) -> None:
    task = MultiLabelTask("moods", 4, 3, missing=missing)
    logits, target = 2 * drawn(N, 3), labels()
    target = target.where(target != -1, missing)
    found = task.labelled(logits, target)
    assert found is not None
    predictions, kept = found
    assert len(kept) == N - 1  # the last sample has no label
    expected = by_loops(log_loss, logits, target, missing)
    assert task.loss(predictions, kept).item() == pytest.approx(expected, rel=1e-12)
    scores = []
    for column in range(3):
        pairs = [
            (z > 0, y == 1)
            for z, y in zip(logits[:, column].tolist(), target[:, column].tolist(), strict=True)
            if y in (0, 1)
        ]
        hits = sum(p and y for p, y in pairs)
        scores.append(2 * hits / sum(p + y for p, y in pairs))
    assert task.metrics["f1"](predictions, kept).item() == pytest.approx(sum(scores) / 3)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("missing", [NAN, -7.0])
def test_regression_loss_and_errors(kind, outputs, missing) -> None:
    task = RegressionTask("age", 4, outputs, kind, missing)
    shape = (N,) if outputs is None else (N, outputs)
    predictions, target = 2 * drawn(*shape), drawn(*shape, seed=1)
    target[1] = missing
    target.view(N, -1)[3, 0] = missing
    found = task.labelled(predictions, target)
    assert found is not None
    expected = by_loops(LOSSES[kind], predictions.view(N, -1), target.view(N, -1), missing)
    assert task.loss(*found).item() == pytest.approx(expected, rel=1e-12)
    there = ~target.isnan() & (target != missing)
    error = (predictions - target)[there]
    assert task.metrics["mae"](*found).item() == pytest.approx(error.abs().mean().item())
    rmse = error.square().mean().sqrt().item()
    assert task.metrics["rmse"](*found).item() == pytest.approx(rmse)
    assert task.head(torch.zeros(N, 4)).shape == shape


@pytest.mark.parametrize("mean", ["sequences", "tokens"])
@pytest.mark.parametrize("parts", [(), (2,)])
def test_tagging_loss_and_metrics(mean, parts) -> None:
    task = TaggingTask("tags", 4, 3, ignore_index=-1, mean=mean)
    states = drawn(N, *parts, 5, 4)
    logits = task.head.double()(states)
    assert logits.shape == (N, 3, *parts, 5)
    g = torch.Generator().manual_seed(2)
    target = torch.randint(-1, 3, (N, *parts, 5), generator=g)
    target[2] = -1
    found = task.labelled(logits, target)
    assert found is not None
    by_sample = []
    for i in range(N):
        rows = logits[i].flatten(1).T.tolist()
        pairs = zip(rows, target[i].flatten().tolist(), strict=True)
        by_sample.append([math.log(sum(map(math.exp, row))) - row[y] for row, y in pairs if y >= 0])
    flat = [x for of_sample in by_sample for x in of_sample]
    means = [sum(x) / len(x) for x in by_sample if x]
    expected = sum(flat) / len(flat) if mean == "tokens" else sum(means) / len(means)
    assert task.loss(*found).item() == pytest.approx(expected, rel=1e-12)
    right = logits.argmax(1) == target
    there = target >= 0
    share = right[there].float().mean().item()
    assert task.metrics["accuracy"](*found).item() == pytest.approx(share)
    scores = []
    for c in range(3):
        said, is_c = (logits.argmax(1) == c) & there, target == c
        scores.append(2 * int((said & is_c).sum()) / int(said.sum() + is_c.sum()))
    assert task.metrics["f1"](*found).item() == pytest.approx(sum(scores) / 3)


def targets() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    tags = torch.randint(0, 3, (8, 5), generator=g)
    tags[:, 3:] = -100
    tags[1] = -100
    moods = torch.randint(-1, 2, (8, 3), generator=g).double()
    moods[2] = -1
    age = drawn(8, 2)
    age[3], age[4, 0] = NAN, NAN
    return {"tags": tags, "moods": moods, "age": age}


class Both(nn.Module):
    """States and their mean, without any convention of the package's encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = torch.tanh(self.net(x))
        vector = states.mean(1)
        return {"tags": states, "moods": vector, "age": vector}


def module() -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = [
        TaggingTask("tags", 4, 3),
        MultiLabelTask("moods", 4, 3, missing=-1),
        RegressionTask("age", 4, 2, missing=NAN),
    ]
    return MultiTaskModule(Both(), tasks, sgd).double()


@pytest.mark.parametrize("callbacks", [list, lambda: [CAGrad(), TaskSAM(0.05)]])
def test_what_has_no_label_is_not_trained_on(callbacks) -> None:
    """Without the samples that have none of a task's labels the training is the same."""
    x, given = drawn(8, 5, 2), targets()
    whole = module()
    fit(whole, callbacks(), DataLoader([(x, given)], batch_size=None))
    kept = {"tags": 1, "moods": 2, "age": 3}
    rows = {task: [i for i in range(8) if i != without] for task, without in kept.items()}
    parts = {task: (x[rows[task]], given[task][rows[task]]) for task in kept}
    apart = module()
    fit(apart, callbacks(), DataLoader([parts], batch_size=None))
    assert_close(whole, apart, 1e-12)


def test_accumulated_batches_are_one_large_batch() -> None:
    one, other = module(), module()
    other = MultiTaskModule(other.encoder, other.tasks, sgd, accumulate_grad_batches=2).double()
    data = Pairs(drawn(8, 5, 2), targets())
    fit(one, [CAGrad()], DataLoader(data, 8))
    fit(other, [CAGrad()], DataLoader(data, 4))
    assert_close(one, other, 1e-12)


def test_metrics_of_an_epoch() -> None:
    model = module()
    made = trainer()
    made.validate(model, DataLoader(Pairs(drawn(8, 5, 2), targets()), 4), verbose=False)
    assert {name for name in made.callback_metrics if not name.endswith("loss")} == {
        "val/tags/accuracy", "val/tags/f1", "val/moods/f1", "val/age/mae", "val/age/rmse",
    }  # fmt: skip
    assert all(value.isfinite() for value in made.callback_metrics.values())


def test_a_classification_with_other_metrics() -> None:
    task = ClassificationTask("kind", 4, 3, metrics={"f1": MacroF1(3)})
    assert sorted(task.metrics) == ["f1"]
    assert sorted(ClassificationTask("kind", 4, 3).metrics) == ["accuracy"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiLabelTask("a", 4, 0), "`num_labels` must be at least 1, got 0"),
        (lambda: RegressionTask("a", 4, 0), "`outputs` must be at least 1, got 0"),
        (lambda: RegressionTask("a", 4, loss="rmse"), "`loss` must be 'mse', 'l1' or 'huber'"),
        (lambda: TaggingTask("a", 4, 1), "`num_classes` must be at least 2, got 1"),
        (lambda: TaggingTask("a", 4, 3, mean="words"), "`mean` must be 'sequences' or 'tokens'"),
        (
            lambda: RegressionTask("a", 4).loss(torch.zeros(3), torch.zeros(3, 1)),
            "must have the shape of the predictions, got \\[3, 1\\] and \\[3\\]",
        ),
        (
            lambda: MultiLabelTask("a", 4, 2).loss(torch.zeros(3, 2), torch.zeros(3)),
            "must have the shape of the logits, got \\[3\\] and \\[3, 2\\]",
        ),
        (
            lambda: TaggingTask("a", 4, 3).head(torch.zeros(3, 4)),
            "Tagging 'a' needs the states of tokens.*got \\[3, 4\\]. Name the task",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
