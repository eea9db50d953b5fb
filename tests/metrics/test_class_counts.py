"""Balanced accuracy and F1 of rare classes, against scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from lightning_flatmtl.metrics import BalancedAccuracy, LabelF1, MacroF1, RegressionError


def drawn(classes: int, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.rand(n, classes, generator=g)  # within [0, 1], where others see probabilities
    target = torch.randint(0, classes - 1, (n,), generator=g)  # the last class has no sample
    return logits, target


@pytest.mark.parametrize("classes", [3, 5])
def test_several_classes_over_several_batches(classes) -> None:
    logits, target = drawn(classes)
    balanced, f1 = BalancedAccuracy(classes), MacroF1(classes)
    for part in (slice(0, 7), slice(7, 40)):
        balanced.update(logits[part], target[part])
        f1.update(logits[part], target[part])
    predicted = logits.argmax(1)
    at = sorted({*target.tolist()})
    recall = [(predicted[target == c] == c).double().mean().item() for c in at]
    assert balanced.compute().item() == pytest.approx(sum(recall) / len(at))
    assert f1.compute().item() == pytest.approx(f1_score(target, predicted, average="macro"))


def test_binary_logits() -> None:
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(30, generator=g), torch.randint(0, 2, (30,), generator=g).float()
    predicted = (logits > 0).long()
    expected = balanced_accuracy_score(target, predicted)
    assert BalancedAccuracy()(logits, target).item() == pytest.approx(expected)
    expected = f1_score(target, predicted, average="macro")
    assert MacroF1()(logits, target).item() == pytest.approx(expected)


def test_missing_entries_and_other_axes() -> None:
    logits, target = drawn(3, 60)
    masked = target.clone()
    masked[::3] = -1
    kept = masked != -1
    one, other = MacroF1(3, missing=-1), MacroF1(3)
    one.update(logits.view(6, 10, 3).movedim(-1, 1), masked.view(6, 10))
    other.update(logits[kept], target[kept])
    assert torch.equal(one.counts, other.counts)


def test_nothing_is_nan_and_a_nan_logit_hits_nothing() -> None:
    nothing = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert math.isnan(MacroF1(3)(*nothing))
    assert math.isnan(BalancedAccuracy(3)(*nothing))
    logits = torch.tensor([[math.nan, 0.0], [0.0, 1.0]])
    assert BalancedAccuracy(2)(logits, torch.tensor([1, 1])).item() == 0.5
    assert BalancedAccuracy()(torch.tensor([math.nan, 1.0]), torch.tensor([0, 1])).item() == 0.5


def test_labels_and_numbers() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(20, 3, generator=g)
    target = torch.randint(0, 2, (20, 3), generator=g)
    expected = f1_score(target, logits > 0, average="macro")
    assert LabelF1(3)(logits, target).item() == pytest.approx(expected)
    values = torch.randn(20, generator=g)
    error = (values - target[:, 0]).double()
    assert RegressionError()(values, target[:, 0]).item() == pytest.approx(error.abs().mean())
    root = RegressionError(root_mean_square=True)(values, target[:, 0]).item()
    assert root == pytest.approx(error.square().mean().sqrt().item())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MacroF1(1), "`num_classes` must be at least 2, got 1"),
        (lambda: LabelF1(0), "`num_labels` must be at least 1, got 0"),
        (
            lambda: MacroF1(3)(torch.zeros(2, 4), torch.zeros(2).long()),
            "must be \\[n, 3, ...\\], as `num_classes` says .*got \\[2, 4\\]",
        ),
        (
            lambda: MacroF1(3)(torch.zeros(2, 3), torch.tensor([0, 3])),
            "`target` must be in \\[0, 3\\), got 3",
        ),
        (
            lambda: MacroF1(3)(torch.zeros(2), torch.zeros(2).long()),
            "as `num_classes` says \\(or binary, for 2\\), got \\[2\\]",
        ),
        (lambda: LabelF1(2)(torch.zeros(2), torch.zeros(2)), "must both be \\[n, labels\\]"),
        (lambda: RegressionError()(torch.zeros(2), torch.zeros(2, 1)), "shape of the targets"),
    ],
)
def test_what_does_not_fit_is_refused(act, message) -> None:
    with pytest.raises(ValueError, match=message):
        act()
