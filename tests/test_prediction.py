"""Joint predictions: exact against all combinations, with abstention, in `predict`."""

import csv
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import JointPrediction, MultiLabelTask, MultiTaskModule, Task
from lightning_flatmtl.callbacks import SaveJointPredictions
from lightning_flatmtl.cli import main
from tests.helpers import data, module, trainer


def logits(samples: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, dtype=torch.float64, generator=g)

    return {"kind": drawn(samples, 4), "odd": drawn(samples), "tags": drawn(samples, 3),
            "yes": drawn(samples, 1)}  # fmt: skip


def distribution(task: str, z: Tensor) -> dict[Any, float]:
    """Every label of one sample with its probability, by the formulas."""
    if task == "kind":
        total = sum(math.exp(v) for v in z)
        return {i: math.exp(v) / total for i, v in enumerate(z)}
    ones = [1 / (1 + math.exp(-v)) for v in z.reshape(-1)]
    found = {}
    for bits in itertools.product((0, 1), repeat=len(ones)):
        found[bits] = math.prod(p if b else 1 - p for p, b in zip(ones, bits, strict=True))
    return found if task == "tags" else {bits[0]: p for bits, p in found.items()}


def by_brute_force(predictions: dict[str, Tensor], sample: int) -> list[tuple[float, Any]]:
    """All combinations, the most likely first."""
    each = [distribution(t, z[sample]).items() for t, z in predictions.items()]
    every = [
        (math.prod(p for _, p in combination), tuple(label for label, _ in combination))
        for combination in itertools.product(*each)
    ]
    assert sum(p for p, _ in every) == pytest.approx(1, rel=1e-12)
    return sorted(every, reverse=True)


def label(values: Tensor) -> Any:
    return tuple(values.tolist()) if values.ndim else values.item()


@pytest.mark.parametrize("seed", range(3))
def test_exact_against_the_product_over_all_combinations(seed: int) -> None:
    predictions = logits(seed=seed)
    joint = JointPrediction(0.3, multi_label=["tags"])(predictions)
    ten = JointPrediction(0.3, multi_label=["tags"], top=10)(predictions)
    all_of_them = JointPrediction(multi_label=["tags"], top=1000)(predictions)
    assert all_of_them.probability.shape == (6, 4 * 2 * 8 * 2)
    assert torch.allclose(all_of_them.probability.sum(1), torch.ones(6).double(), rtol=1e-12)
    for i in range(6):
        every = by_brute_force(predictions, i)
        best, labels = every[0]
        assert float(joint.probability[i]) == pytest.approx(best, rel=1e-12)
        assert tuple(label(joint.labels[t][i]) for t in predictions) == labels
        assert bool(joint.abstained[i]) == (best < 0.3)
        for k in range(10):
            p, labels = every[k]
            assert float(ten.probability[i, k]) == pytest.approx(p, rel=1e-12)
            assert tuple(label(ten.labels[t][i, k]) for t in predictions) == labels
    assert torch.equal(ten.abstained, joint.abstained)
    assert joint.coverage == 1 - joint.abstained.double().mean()


def test_many_tasks_underflow_nowhere() -> None:
    predictions = {f"t{i}": torch.zeros(2, 10) for i in range(1000)}
    joint = JointPrediction(0.0)(predictions)
    assert joint.log_probability.tolist() == pytest.approx([-1000 * math.log(10)] * 2)
    assert not joint.abstained.any()  # 0 answers always, though the probability is 0 as a float
    assert JointPrediction(1e-300)(predictions).abstained.all()


def test_the_ends_of_the_threshold_and_nan() -> None:
    sure = {"a": torch.tensor([[math.inf, 0.0], [1.0, 0.0], [math.nan, 0.0]])}
    sure["a"][0] = torch.tensor([0.0, -math.inf])  # a class that is ruled out
    assert JointPrediction(1.0)(sure).abstained.tolist() == [False, True, True]
    assert JointPrediction(0.0)(sure).abstained.tolist() == [False, False, True]


def test_tasks_that_are_absent_or_take_no_part() -> None:
    predictions = logits()
    two = JointPrediction(classes={"kind": 4, "yes": 2})(predictions)
    assert list(two.labels) == ["kind", "yes"]
    partly = {"kind": predictions["kind"], "odd": None, "yes": predictions["yes"]}
    for classes in (None, {"kind": 4, "odd": 2, "yes": 2}):
        joint = JointPrediction(classes=classes)(partly)
        assert torch.equal(joint.log_probability, two.log_probability)
    boxes = {**predictions, "box": torch.zeros(6, 4, 2)}
    assert JointPrediction(classes={"kind": 4})(boxes).labels.keys() == {"kind"}


def test_batches_are_joined_and_half_precision_is_taken() -> None:
    predictions = logits()
    joint = JointPrediction(multi_label=["tags"])
    whole = joint(predictions)
    parts = joint([{t: z[:4] for t, z in predictions.items()},
                   {t: z[4:] for t, z in predictions.items()}])  # fmt: skip
    assert torch.equal(whole.log_probability, parts.log_probability)
    assert all(torch.equal(whole.labels[t], parts.labels[t]) for t in whole.labels)
    half = joint({t: z.bfloat16() for t, z in predictions.items()})
    assert half.probability.dtype == torch.float64
    empty = joint({t: z[:0] for t, z in predictions.items()})
    assert empty.labels["tags"].shape == (0, 3)


def test_right_is_right_in_every_task() -> None:
    predictions = logits()
    joint = JointPrediction(multi_label=["tags"])(predictions)
    targets = {task: labels.clone() for task, labels in joint.labels.items()}
    assert joint.correct(targets).all()
    targets["tags"][2, 1] = 1 - targets["tags"][2, 1]
    targets["kind"][4] = (targets["kind"][4] + 1) % 4
    assert joint.correct(targets).tolist() == [True, True, False, True, False, True]
    top = JointPrediction(multi_label=["tags"], top=3)(predictions)
    assert torch.equal(top.correct(targets), joint.correct(targets))
    with pytest.raises(ValueError, match="got none for 'odd'"):
        joint.correct({"kind": targets["kind"]})
    with pytest.raises(ValueError, match=r"target of 'tags' must have shape \[6, 3\], got \[6\]"):
        joint.correct({**targets, "tags": targets["odd"]})


def test_what_is_refused() -> None:
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\]"):
            JointPrediction(threshold)
    with pytest.raises(ValueError, match="`top` must be at least 1"):
        JointPrediction(top=0)
    for classes in ({}, {"a": 0}):
        with pytest.raises(ValueError, match="`classes` must give at least one task"):
            JointPrediction(classes=classes)
    joint = JointPrediction()
    for bad, words in (
        ({}, "logits of at least one task, got \\[\\]"),
        ([], "at least one batch, got none"),
        ({"a": torch.zeros(2, 3, 4)}, r"'a' must have shape .* got \[2, 3, 4\]"),
        ({"a": torch.zeros(())}, r"'a' must have shape"),
        ({"a": torch.zeros(2, 0)}, r"got \[2, 0\]"),
        ({"a": [0.1]}, "got list"),
        ({"a": torch.zeros(2, 3).long()}, "must be floating-point numbers, got torch.int64"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, "same samples, got {'a': 2, 'b': 3}"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "same tasks, got different ones"),
    ):
        with pytest.raises(ValueError, match=words):
            joint(bad)
    with pytest.raises(TypeError, match="or a list of such, got Tensor"):
        joint(torch.zeros(2))
    with pytest.raises(TypeError, match="of one data loader, got those of 2"):
        joint([[{"a": torch.zeros(2)}], [{"a": torch.zeros(2)}]])
    with pytest.raises(ValueError, match=r"'kind' must be of 3 classes, got shape \[6, 4\]"):
        JointPrediction(classes={"kind": 3})(logits())
    with pytest.raises(ValueError, match="none of \\['other'\\]"):
        JointPrediction(classes={"other": 3})(logits())


def test_what_a_trainer_predicts() -> None:
    model = module()
    joint = JointPrediction(0.5, classes={"a": 3})
    predicted = trainer().predict(model, data(20))
    assert joint(predicted).probability.shape == (20,)

    class Joint(MultiTaskModule):
        def predict_step(self, *args: Any) -> Any:
            return joint(super().predict_step(*args))

    inside = trainer().predict(module(kind=Joint), data(20))
    assert torch.equal(torch.cat([p.labels["a"] for p in inside]), joint(predicted).labels["a"])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("loaders", [1, 2])
def test_the_callback_writes_a_row_for_each_sample(tmp_path: Path, loaders: int) -> None:
    torch.manual_seed(0)
    model = MultiTaskModule(
        nn.Flatten(),
        [
            Task("kind", nn.Linear(36, 3), nn.CrossEntropyLoss()),
            MultiLabelTask("tags", 36, 4),
        ],
    )
    inputs = 4 * torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    writer = SaveJointPredictions(str(tmp_path / "made"), threshold=0.25)
    given = [DataLoader(inputs, 4) for _ in range(loaders)]
    trainer([writer]).predict(model, given if loaders > 1 else given[0])
    files = sorted((tmp_path / "made").iterdir())
    assert [f.name for f in files] == [f"loader_{i}_rank_0.csv" for i in range(loaders)]
    joint = JointPrediction(0.25, multi_label=["tags"])(model(inputs))
    assert 0 < joint.coverage < 1
    for file in files:
        found = rows(file)
        assert [int(row["sample"]) for row in found] == list(range(10))
        assert [int(row["kind"]) for row in found] == joint.labels["kind"].tolist()
        assert [row["abstained"] == "True" for row in found] == joint.abstained.tolist()
        for row, tags, p in zip(found, joint.labels["tags"], joint.probability, strict=True):
            assert row["tags"].split() == [str(int(i)) for i in tags.nonzero()]
            assert float(row["probability"]) == pytest.approx(float(p), rel=1e-5)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    config = Path(__file__).parents[1] / "examples" / "multidigits" / "f_cagrad.yaml"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    small = ["--data.train_pairs=64", "--data.val_pairs=8", "--data.test_pairs=24"]
    writer = ["--trainer.callbacks+=SaveJointPredictions", "--trainer.callbacks.threshold=0.2"]
    main(["predict", f"--config={config}", *quiet, *small, *writer])
    found = rows(Path("predictions") / "loader_0_rank_0.csv")
    assert len(found) == 24
    assert list(found[0]) == ["sample", "left", "right", "probability", "abstained"]
