"""Aggregators made of others: composition, moving average of the weights, by parameter group."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl import aggregators as a
from lightning_flatmtl.cli import FlatMTLCLI
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import min_norm_weights
from tests import naive
from tests.aggregators.specs import SPECS
from tests.helpers import assert_close, assert_identical, data, fit, module
from tests.hosts import HOSTS
from tests.test_exact import naive_fit

EACH_HOST = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS.keys())


def rows(seed: int, m: int = 3, d: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, dtype=torch.float64, generator=g)


def values(seed: int, m: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.1 + torch.rand(m, dtype=torch.float64, generator=g)


# Composition.


def test_a_composition_that_exists_already() -> None:
    ours, theirs = a.Composition(a.IMTLL(lr=0.1), a.IMTLG()), a.IMTL(lr=0.1)
    for i in range(5):
        for part in ("loss", "flat"):
            found = ours(rows(i), losses=values(i), part=part)  # type: ignore[arg-type]
            expected = theirs(rows(i), losses=values(i), part=part)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        ours.step()
        theirs.step()


def test_the_gradient_method_sees_weighted_gradients_and_losses() -> None:
    seen: list[TaskGradients] = []

    class Notes(a.Aggregator):
        def aggregate(self, gradients: TaskGradients) -> Tensor:
            seen.append(gradients)
            return gradients.jacobian.abs().sum(0)

    w = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    found = a.Composition(a.LinearScalarization(w.tolist()), Notes())(rows(0), losses=values(0))
    torch.testing.assert_close(found, (rows(0) * w[:, None]).abs().sum(0))
    (shown,) = seen
    weighted = rows(0) * w[:, None]
    torch.testing.assert_close(shown.jacobian, weighted)
    torch.testing.assert_close(shown.gram, weighted @ weighted.T)
    assert shown.losses is not None
    torch.testing.assert_close(shown.losses, values(0) * w)
    assert shown.loss_weights is None


def test_weights_of_both_are_multiplied() -> None:
    """DB-MTL divides by the losses that it sees, weighted ones."""
    composed = a.Composition(a.LinearScalarization([4.0, 1.0]), a.DBMTL())
    losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = composed.loss_weights(("0", "1"), losses)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5], dtype=torch.float64))
    expected = a.DBMTL()(rows(1, 2), losses=losses)
    torch.testing.assert_close(composed(rows(1, 2), losses=losses), expected)


@pytest.mark.parametrize("sam", [[], [TaskSAM(0.05)]], ids=["plain", "flat"])
@pytest.mark.parametrize("method", [a.MGDA, lambda: a.GradDrop(seed=3), lambda: a.MoCo(0.5)])
def test_training_on_weighted_losses(method: Any, sam: list[Any]) -> None:
    """As if the losses themselves were multiplied, heads included."""

    class Weighted(MultiTaskModule):
        def task_loss(self, task: Any, features: Any, batch: Any) -> Tensor | None:
            loss = super().task_loss(task, features, batch)
            return None if loss is None else loss * {"a": 2.0, "b": 0.5}[task.name]

    ours, expected = module(), module(kind=Weighted)
    weights = a.LinearScalarization({"a": 2.0, "b": 0.5})
    fit(ours, [a.Composition(weights, method()), *sam], max_epochs=2)
    fit(expected, [method(), *sam], max_epochs=2)
    assert_close(ours, expected, 1e-10)


def flat(state: Any) -> list[float]:
    """All numbers of a state."""
    if isinstance(state, dict):
        return [number for entry in state.values() for number in flat(entry)]
    return [float(x) for x in state] if isinstance(state, list) else [float(state)]


@EACH_HOST
@pytest.mark.parametrize("weighting", [a.FAMO, a.DynamicWeightAverage, a.UncertaintyWeighting])
def test_the_weighting_learns_as_it_does_alone(make: Any, weighting: Any) -> None:
    """The gradient method that adds the rows up leaves the weighting alone."""

    class Sum(a.GramAggregator):
        def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
            return torch.ones(len(gram), dtype=torch.float64)

    alone, composed = make(), make()
    method, inner = weighting(), weighting()
    fit(alone, [method], max_epochs=3)
    fit(composed, [a.Composition(inner, Sum())], max_epochs=3)
    assert_close(composed, alone, 1e-10)
    assert flat(inner.get_state()) == pytest.approx(flat(method.get_state()), rel=1e-9)


@pytest.mark.parametrize(
    ("weighting", "method", "error", "message"),
    [
        (a.MGDA, a.PCGrad, ValueError, "`weighting` must be a method that looks at no gradient"),
        (a.FAMO, a.FAMO, ValueError, "`aggregator` must be a method on the gradients"),
        (lambda: a.FAMO, a.PCGrad, TypeError, "`weighting` must be an aggregator.*the class FAMO"),
        (a.FAMO, lambda: "PCGrad", TypeError, "`aggregator` must be an aggregator.*got str"),
    ],
)
def test_compositions_that_make_no_sense(
    weighting: Any, method: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        a.Composition(weighting(), method())


# The moving average.


def test_the_average_of_the_weights_by_hand() -> None:
    """By part and task; an absent task keeps its average."""
    method = a.MovingAverage(a.MGDA(), beta=0.75)
    kept: dict[tuple[str, str], float] = {}
    batches = [("x", "y", "z"), ("x", "z"), ("y",), ("x", "y", "z")]
    for i, tasks in enumerate(batches):
        for part in ("loss", "flat"):
            matrix = rows(10 * i + len(part), len(tasks))
            raw = min_norm_weights(matrix @ matrix.T)
            for task, new in zip(tasks, raw.tolist(), strict=True):
                old = kept.get((part, task), new)
                kept[part, task] = 0.75 * old + 0.25 * new
            expected = torch.tensor([kept[part, t] for t in tasks], dtype=torch.float64) @ matrix
            found = method(matrix, tasks=tasks, part=part)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@EACH_HOST
@pytest.mark.parametrize("name", ["CAGrad", "FAMO", "GradNorm", "IMTL", "LinearScalarization"])
def test_an_average_of_nothing_old_is_the_method(make: Any, name: str) -> None:
    alone, averaged = make(), make()
    fit(alone, [SPECS[name].make(), TaskSAM(0.05)], max_epochs=2)
    fit(averaged, [a.MovingAverage(SPECS[name].make(), beta=0.0), TaskSAM(0.05)], max_epochs=2)
    assert_close(averaged, alone, 1e-10)


def test_weights_of_losses_are_averaged_too() -> None:
    method = a.MovingAverage(a.ScaleInvariant(), beta=0.5)
    first = method.loss_weights(("x", "y"), torch.tensor([1.0, 2.0], dtype=torch.float64))
    second = method.loss_weights(("x", "y"), torch.tensor([0.25, 2.0], dtype=torch.float64))
    assert first is not None
    assert second is not None
    assert first.tolist() == [1.0, 0.5]
    assert second.tolist() == [2.5, 0.5]
    assert not method.needs_gradients


def test_a_direction_that_is_no_weighted_sum_has_no_average() -> None:
    with pytest.raises(ValueError, match="weighted sum of the task gradients, got GradDrop"):
        a.MovingAverage(a.GradDrop())
    with pytest.raises(ValueError, match="weighted sum of the task gradients, got DBMTL"):
        a.MovingAverage(a.DBMTL(beta=0.5))(rows(0), losses=values(0))
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\), got 1"):
        a.MovingAverage(a.MGDA(), beta=1)


# By group.


def names_and_sizes() -> list[tuple[str, int]]:
    named = module().named_parameters()
    return [(name, p.numel()) for name, p in named if name.startswith("encoder.")]


def by_hand(group_of: Any) -> Any:
    """MGDA by brute force on the columns of every group."""

    def direction(matrix: Tensor, losses: Tensor) -> Tensor:
        groups = [group_of(name) for name, size in names_and_sizes() for _ in range(size)]
        found = torch.zeros_like(matrix[0])
        for group in set(groups):
            at = torch.tensor([g == group for g in groups])
            found[at] = naive.mgda(matrix[:, at], losses)
        return found

    return direction


GROUPS: dict[str, tuple[Any, Any]] = {
    "layer": ("layer", lambda name: name.rsplit(".", 1)[0]),
    "parameter": ("parameter", lambda name: name),
    "one": (1, lambda name: "encoder"),
    "two": (2, lambda name: name.split(".")[1]),
    "list": (
        ["encoder.4.weight", "encoder.0"],
        lambda name: (name[8] == "0") + 2 * (name[8:] == "4.weight"),
    ),
}


@pytest.mark.parametrize("sam", [{}, {"rho": 0.05}, {"rho": 0.05, "arm": "direct"}])
@pytest.mark.parametrize("name", GROUPS)
def test_every_group_by_itself(name: str, sam: dict[str, Any]) -> None:
    groups, group_of = GROUPS[name]
    ours, reference = module(), module()
    flat = [TaskSAM(sam["rho"], aggregate=sam.get("arm", "split"))] if sam else []
    fit(ours, [a.ByGroup(a.MGDA(), groups), *flat])
    naive_fit(reference, by_hand(group_of), **sam)
    assert_close(ours, reference, 1e-10)


def test_all_in_one_group_is_the_method() -> None:
    alone, grouped = module(), module()
    fit(alone, [a.CAGrad(), TaskSAM(0.05)])
    fit(grouped, [a.ByGroup(a.CAGrad(), 1), TaskSAM(0.05)])
    assert_close(grouped, alone, 1e-12)


def test_a_state_for_every_group() -> None:
    method = a.ByGroup(a.NashMTL(max_norm=1.0, update_interval=2, normalize=True), "layer")
    fit(module(), [method, TaskSAM(0.05)])
    assert set(method.get_state()["parts"]) == {"encoder.0", "encoder.1", "encoder.4"}


def test_groups_of_a_taken_over_and_of_a_compiled_trunk_have_the_same_names() -> None:
    matrix = rows(0, 2, 6)
    sizes = (("trunk._orig_mod.0.weight", 4), ("trunk._orig_mod.0.bias", 2))
    shown = TaskGradients(matrix, matrix @ matrix.T, ("x", "y"), parameters=sizes)
    method = a.ByGroup(a.MovingAverage(a.MGDA()))
    torch.testing.assert_close(method.aggregate(shown), a.MGDA()(matrix))
    assert list(method.parts) == ["trunk.0"]


def test_a_beginning_that_fits_nothing_is_told_once() -> None:
    with pytest.warns(UserWarning, match=r"got \['encoder.7'\], which is not") as told:
        fit(module(), [a.ByGroup(a.MGDA(), ["encoder.0", "encoder.7"])], max_epochs=2)
    assert sum("encoder.7" in str(w.message) for w in told) == 1


@pytest.mark.parametrize("groups", [0, True, "block", [], ["a", "a"], [1], None, 1.5])
def test_groups_that_are_none(groups: Any) -> None:
    with pytest.raises(ValueError, match="`groups` must be 'layer', 'parameter', a number"):
        a.ByGroup(a.MGDA(), groups)


@pytest.mark.parametrize("make", [a.IMTL, a.GradNorm, a.FAMO, lambda: a.MovingAverage(a.IMTL())])
def test_weights_of_losses_do_not_differ_by_group(make: Any) -> None:
    with pytest.raises(ValueError, match=r"use Composition\(weighting"):
        a.ByGroup(make())
    a.Composition(a.IMTLL(), a.ByGroup(a.IMTLG()))(rows(0), losses=values(0))


def test_features_have_no_groups() -> None:
    net = module(gradients="features")
    with pytest.raises(ValueError, match="needs the task gradients at the parameters"):
        fit(net, [a.ByGroup(a.MGDA())])


# What they share.


def test_the_state_of_other_parts_is_another_callbacks(tmp_path: Path) -> None:
    saved = a.Composition(a.UncertaintyWeighting(), a.PCGrad())
    other = a.Composition(a.UncertaintyWeighting(), a.GradVac())
    assert saved.state_key == "lightning_flatmtl.Composition(UncertaintyWeighting, PCGrad)"
    nested = a.Composition(a.IMTLL(), a.ByGroup(a.MGDA()))
    assert nested.state_key == "lightning_flatmtl.Composition(IMTLL, ByGroup(MGDA))"
    fit(module(), [saved]).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match=r"add the following callbacks: .*Weighting, PCGrad"):
        fit(module(), [other], max_epochs=2, ckpt_path=tmp_path / "one.ckpt")


def test_a_part_gets_every_hook() -> None:
    class Counts(a.LossWeighting):
        def __init__(self) -> None:
            self.hooks: list[str] = []

        def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> None:
            return None

        def on_fit_start(self, *args: Any) -> None:
            self.hooks.append("fit")

        def on_train_epoch_end(self, *args: Any) -> None:
            self.hooks.append("epoch")

        def on_before_zero_grad(self, *args: Any) -> None:
            self.hooks.append("zero")

    inner = Counts()
    fit(module(), [a.Composition(inner, a.ByGroup(a.MGDA()))], max_epochs=2)
    assert inner.hooks == ["fit", *["zero"] * 3, "epoch", *["zero"] * 3, "epoch"]


YAML = """
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: Composition
      init_args:
        weighting: {class_path: UncertaintyWeighting, init_args: {lr: 0.1}}
        aggregator:
          class_path: ByGroup
          init_args:
            aggregator: {class_path: MovingAverage, init_args: {aggregator: CAGrad, beta: 0.5}}
            groups: [encoder.0]
    - TaskSAM
model:
  class_path: MultiTaskModule
  init_args:
    encoder: {class_path: ConvEncoder, init_args: {widths: [4], features: 8}}
    tasks:
      - {class_path: ClassificationTask, init_args: {name: left, in_features: 8, num_classes: 10}}
      - {class_path: ClassificationTask, init_args: {name: right, in_features: 8, num_classes: 10}}
data: {class_path: MultiDigits, init_args: {train_pairs: 64, val_pairs: 32, test_pairs: 32}}
"""


@pytest.mark.filterwarnings("ignore:Expected every entry of `groups`")
def test_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "config.yml").write_text(YAML)
    monkeypatch.setattr(sys, "argv", ["flatmtl", "fit", "--config=config.yml"])
    by = FlatMTLCLI().trainer
    method = by.callbacks[0]  # type: ignore[attr-defined]
    assert isinstance(method, a.Composition)
    assert repr(method) == (
        "Composition(weighting=UncertaintyWeighting(lr=0.1, half=False), aggregator=ByGroup("
        "aggregator=MovingAverage(aggregator=CAGrad(c=0.4, rescale=True), beta=0.5), "
        "groups=['encoder.0']))"
    )


# MoCo and MoDo, which keep rows and move weights.


def project(v: Tensor) -> Tensor:
    """The nearest point of the simplex, by bisection of the level."""
    low, high = float(v.min()) - 1, float(v.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((v - middle).clamp(min=0).sum()) > 1 else (low, middle)
    return (v - high).clamp(min=0)


class NaiveMoCo:
    def __init__(self, beta: float, gamma: float, rho: float) -> None:
        self.beta, self.gamma, self.rho = beta, gamma, rho
        self.parts: list[Any] = [None, None]
        self.calls = 0

    def __call__(self, matrix: Tensor, losses: Tensor) -> Tensor:
        at = self.calls % 2
        self.calls += 1
        y, w = self.parts[at] or (matrix, torch.full_like(matrix[:, 0], 1 / len(matrix)))
        y = y - self.beta * (y - matrix)
        after = project(w - self.gamma * (y @ (y.T @ w) + self.rho * w))
        self.parts[at] = y, after
        return w @ y


class NaiveMoDo:
    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.parts: list[Any] = [None, None]
        self.calls = 0

    def __call__(self, matrix: Tensor, losses: Tensor) -> Tensor:
        at = self.calls % 2
        self.calls += 1
        before, w = self.parts[at] or (None, torch.full_like(matrix[:, 0], 1 / len(matrix)))
        after = w if before is None else project(w - self.gamma * before @ (matrix.T @ w))
        self.parts[at] = matrix, after
        return w @ matrix


@pytest.mark.parametrize(
    ("make", "by_hand"),
    [
        (lambda: a.MoCo(0.3, 0.5, 0.2), lambda: NaiveMoCo(0.3, 0.5, 0.2)),
        (lambda: a.MoCo(1.0, 20.0), lambda: NaiveMoCo(1.0, 20.0, 0.0)),
        (lambda: a.MoDo(2.0), lambda: NaiveMoDo(2.0)),
    ],
)
def test_methods_that_move_weights_a_step_at_a_time(make: Any, by_hand: Any) -> None:
    ours, reference = module(), module()
    fit(ours, [make(), TaskSAM(0.3)])
    naive_fit(reference, by_hand(), rho=0.3)
    assert_close(ours, reference, 1e-10)
    method, expected = make(), by_hand()
    for i in range(12):
        found = method(rows(i), part=("loss", "flat")[i % 2])  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected(rows(i), None), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [a.MoCo, a.MoDo])
def test_weights_of_present_tasks_sum_to_one(method: Any) -> None:
    aggregator = method(gamma=0.3)
    present = [("x", "y", "z"), ("x", "y"), ("z",), ("y", "new"), ("x", "y", "z", "new")]
    for i, tasks in enumerate(present * 3):
        direction = aggregator(torch.ones(len(tasks), 4).double() * (1 + i % 3), tasks=tasks)
        assert direction.isfinite().all()
        weights = aggregator._present("loss", tasks)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_rows_of_another_width_begin_anew() -> None:
    for method in (a.MoCo(gamma=0.3), a.MoDo(gamma=0.3)):
        method(rows(0))
        method(rows(1, d=5))
        assert method(rows(2, d=5)).shape == (5,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a.MoCo(beta=0), r"`beta` must be in \(0, 1\], got 0"),
        (lambda: a.MoCo(gamma=0), r"`gamma` must be in \(0, inf\), got 0"),
        (lambda: a.MoCo(rho=-1), r"`rho` must be in \[0, inf\), got -1"),
        (lambda: a.MoDo(gamma=float("nan")), r"`gamma` must be in \(0, inf\), got nan"),
    ],
)
def test_bounds(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_on_noise_moco_trusts_its_weights_more_than_mgda() -> None:
    """What the average is for: of equal tasks under noise MGDA's weights jump, MoCo's hardly."""
    g = torch.Generator().manual_seed(0)
    moco = a.MoCo(beta=0.05, gamma=0.01)
    jumps = {"mgda": 0.0, "moco": 0.0}
    for _ in range(300):
        noisy = 0.2 + torch.randn(2, 20, dtype=torch.float64, generator=g)
        moco(noisy)
        mgda = min_norm_weights(noisy @ noisy.T)
        jumps["mgda"] += float((mgda[0] - 0.5).abs())
        jumps["moco"] += float((moco._present("loss", ("0", "1"))[0] - 0.5).abs())
    assert jumps["moco"] < jumps["mgda"]


def test_a_resumed_fit_of_everything_at_once(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        inner = a.ByGroup(a.MovingAverage(a.PCGrad()), "parameter")
        return [a.Composition(a.FAMO(), inner), TaskSAM(0.05)]

    def memoryless(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    nets = [module(optimizer=memoryless) for _ in range(3)]
    fit(nets[0], callbacks(), data(), max_epochs=4)
    fit(nets[1], callbacks(), data(), max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    fit(nets[2], callbacks(), data(), max_epochs=4, ckpt_path=tmp_path / "two.ckpt")
    assert_identical(nets[2], nets[0])
    assert nn.utils.parameters_to_vector(nets[2].parameters()).isfinite().all()
