"""Shared and own parts: shapes of any kind, what is refused, what is defined at the edges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import (
    CGC,
    PLE,
    CrossStitch,
    MLPEncoder,
    MMoE,
    SoftSharing,
    TableEmbedding,
    TaskAttention,
    attention_picture,
)
from tests.helpers import fit
from tests.models.sharing import INPUTS, SHARING, TASKS, inputs, loader, mlp, module

ROWS = {"numeric": torch.randn(5, 3), "categorical": torch.tensor([[4, 1]] * 5)}


def table_mlp() -> MLPEncoder:
    return MLPEncoder(3, [5, 2], embedding=2, widths=[4])


def small() -> MLPEncoder:
    return MLPEncoder(7, widths=[4])


ON_TABLES: dict[str, Callable[[], nn.Module]] = {
    "soft": lambda: SoftSharing(TASKS, table_mlp),
    "cross-stitch": lambda: CrossStitch(TASKS, [table_mlp, lambda: MLPEncoder(4, widths=[4])]),
    "MMoE": lambda: MMoE(TASKS, small, 2, gate_features=7, stem=TableEmbedding(3, [5, 2], 2)),
    "MMoE's own gate": lambda: MMoE(TASKS, table_mlp, 4, gate=table_mlp),
    "CGC": lambda: CGC(TASKS, small, gate_features=7, stem=TableEmbedding(3, [5, 2], 2)),
    "CGC's own gate": lambda: CGC(TASKS, table_mlp, 2, 2, gate=table_mlp),
    "attention": lambda: TaskAttention(TASKS, table_mlp(), lambda: MLPEncoder(4, widths=[4]), 4),
}


@pytest.mark.parametrize("name", ON_TABLES)
def test_on_tables(name: str) -> None:
    features = ON_TABLES[name]()(ROWS)
    assert {task: tuple(y.shape) for task, y in features.items()} == {"a": (5, 4), "b": (5, 4)}


def conv(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


def test_on_maps() -> None:
    images = torch.randn(2, 3, 6, 6)
    stitched = CrossStitch(TASKS, [conv(3, 4), conv(4, 5)], channels=[4])
    experts = MMoE(TASKS, conv(3, 5), gate_features=108)
    for encoder in (stitched, experts):
        assert {tuple(y.shape) for y in encoder(images).values()} == {(2, 5, 6, 6)}


def test_a_unit_mixes_channel_by_channel() -> None:
    encoder = CrossStitch(TASKS, [conv(3, 2), nn.Identity], channels=[2], own=1.0)
    images = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        first = {task: encoder.columns[task][0](images) for task in TASKS}
        encoder.units[0]["a"][1, 1] = 3.0
    torch.testing.assert_close(encoder(images)["b"], first["b"])
    expected = first["a"].clone()
    expected[:, 1] += 3 * first["b"][:, 1]
    torch.testing.assert_close(encoder(images)["a"], expected)


@pytest.mark.parametrize("name", SHARING)
def test_copies_begin_with_weights_of_their_own(name: str) -> None:
    seen: set[float] = set()
    weights = [p for p in SHARING[name].make().parameters() if p.ndim == 2 and p.shape[1] > 2]
    for weight in weights:
        assert weight[0, 0].item() not in seen
        seen.add(weight[0, 0].item())


@pytest.mark.parametrize("name", SHARING)
def test_gates_and_attention_sum_up_to_one(name: str) -> None:
    net = module(name).encoder
    if hasattr(net, "gate_weights"):
        found = net.gate_weights(inputs())
        assert list(found) == list(TASKS)
        stacked = torch.cat(list(found.values()))
    elif hasattr(net, "attention_weights"):
        stacked = net.attention_weights(inputs())
        assert stacked.shape == (5, 2, 2, 2)
    else:
        return
    assert not stacked.requires_grad
    torch.testing.assert_close(stacked.sum(-1), torch.ones_like(stacked.sum(-1)))


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE"])
def test_gate_weights_are_those_of_the_features(name: str) -> None:
    """With experts that are constant the features are the weights."""
    net = module(name).encoder
    experts = net.experts if name == "MMoE" else net.levels[-1]
    of_task = experts if name == "MMoE" else [*experts.experts["a"], *experts.shared_experts]
    for i, expert in enumerate(of_task):
        nn.init.zeros_(expert[0].weight)
        nn.init.constant_(expert[0].bias, float(i))
    weights = net.gate_weights(inputs())["a"]
    expected = weights @ torch.tanh(torch.arange(len(of_task), dtype=torch.float64))
    torch.testing.assert_close(net(inputs())["a"][:, 0], expected)


def test_an_expert_that_no_gate_uses_gets_a_gradient_of_zero() -> None:
    """It rests, but for what the optimizer does by itself; nothing is NaN, with TaskSAM neither."""

    class Never(nn.Module):
        """A gate that never chooses the first expert."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(INPUTS, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.full_like(x[:, :1], -1e4), self.linear(x)], 1)

    made = module("MMoE")
    made.encoder = MMoE(TASKS, mlp(), 3, gate=Never).double()
    first = {n: p.clone() for n, p in made.encoder.experts[0].named_parameters()}
    fit(made, [CAGrad(), TaskSAM(0.05)], loader())
    weights = made.encoder.gate_weights(inputs())
    assert all(not w[:, 0].any() for w in weights.values())
    for n, p in made.encoder.experts[0].named_parameters():
        assert torch.equal(p, first[n])
        assert torch.equal(p.grad, torch.zeros_like(p))
    assert all(torch.isfinite(p).all() for p in made.parameters())


@pytest.mark.parametrize("name", SHARING)
def test_one_task_alone(name: str) -> None:
    """As in the single-task runs of a comparison."""
    made = {
        "soft l2": lambda: SoftSharing(["a"], mlp()),
        "soft trace": lambda: SoftSharing(["a"], mlp(), distance="trace"),
        "cross-stitch": lambda: CrossStitch(["a"], [mlp(outputs=5), mlp(5)]),
        "MMoE": lambda: MMoE(["a"], mlp(), gate_features=INPUTS),
        "CGC": lambda: CGC(["a"], mlp(), gate_features=INPUTS),
        "PLE": lambda: PLE(["a"], [mlp(outputs=5), mlp(5)], gate_features=[INPUTS, 5]),
        "attention": lambda: TaskAttention(["a"], mlp()(), mlp(4), 4),
    }[name]()
    assert tuple(made.double()(inputs())["a"].shape) == (5, 4)
    if isinstance(made, SoftSharing):
        assert made.penalty() is None
    if isinstance(made, CrossStitch):
        assert made.units[0]["a"].tolist() == [[1.0]]


# The penalty.


@pytest.mark.parametrize("distance", ["l2", "trace"])
def test_what_is_frozen_is_not_penalised(distance: Any) -> None:
    net = SoftSharing(TASKS, mlp(), weight=2.0, distance=distance)
    for trunk in net.trunks.values():
        trunk[0].weight.requires_grad_(False)
    a, b = (trunk[0].bias for trunk in net.trunks.values())
    expected = (a - b).square().sum() / 2
    if distance == "trace":
        expected = torch.linalg.matrix_norm(torch.stack([a, b]), "nuc")
    torch.testing.assert_close(net.penalty(), 2 * expected)
    for trunk in net.trunks.values():
        trunk.requires_grad_(False)
    assert net.penalty() is None
    assert SoftSharing(TASKS, mlp(), weight=0.0).penalty() is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_trace_norm_of_equal_trunks_has_the_smallest_subgradient(value: float) -> None:
    net = SoftSharing(TASKS, mlp(), weight=1.0, distance="trace").double()
    for p in net.parameters():
        nn.init.constant_(p, value)
    penalty = net.penalty()
    assert penalty is not None
    penalty.backward()
    for p in net.trunks["a"].parameters():
        expected = value / (2 * p.numel()) ** 0.5  # w / ||W|| for a matrix of rank one
        torch.testing.assert_close(p.grad, torch.full_like(p, expected))


def test_trunks_that_differ_are_refused() -> None:
    widths = iter([4, 5])
    with pytest.raises(ValueError, match="same parameters"):
        SoftSharing(TASKS, lambda: nn.Linear(3, next(widths)))


# What is refused.

FORGOTTEN = "`{}` must make a new module at each call, got a Linear"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no task": (lambda: SoftSharing([], mlp()), "`tasks` must be different names, at least one"),
    "twice": (lambda: MMoE(["a", "a"], mlp(), gate_features=6), "`tasks` must be different names"),
    "a string": (lambda: CrossStitch("ab", [mlp(), mlp(4)]), "`tasks` must be different names"),
    "a module": (lambda: SoftSharing(TASKS, nn.Linear(2, 2)), FORGOTTEN.format("trunk")),
    "an expert": (
        lambda: MMoE(TASKS, nn.Linear(2, 2), gate_features=2),
        FORGOTTEN.format("expert"),
    ),
    "no module": (lambda: SoftSharing(TASKS, lambda: 3), "`trunk` must make an nn.Module, got 3"),
    "weight": (
        lambda: SoftSharing(TASKS, mlp(), -1.0),
        r"`weight` must be in \[0, inf\), got -1.0",
    ),
    "nan": (lambda: SoftSharing(TASKS, mlp(), float("nan")), r"`weight` must be in \[0, inf\)"),
    "distance": (
        lambda: SoftSharing(TASKS, mlp(), distance="l1"),  # type: ignore[arg-type]
        "`distance` must be 'l2' or 'trace', got 'l1'",
    ),
    "one stage": (lambda: CrossStitch(TASKS, [mlp()]), "`stages` must be at least 2.*got 1"),
    "own": (lambda: CrossStitch(TASKS, [mlp(), mlp(4)], own=1.5), r"`own` must be in \[0, 1\]"),
    "channels": (
        lambda: CrossStitch(TASKS, [mlp(), mlp(4)], channels=[4, 4]),
        r"`channels` must be 1 numbers of at least 1.*got \[4, 4\]",
    ),
    "one expert": (lambda: MMoE(TASKS, mlp(), 1, 6), "`experts` must be at least 2, got 1"),
    "no gate": (lambda: MMoE(TASKS, mlp()), "One of `gate_features` and `gate`.*got neither"),
    "two gates": (lambda: CGC(TASKS, mlp(), 1, 1, 6, mlp()), "`gate` must be given, got both"),
    "gate size": (lambda: MMoE(TASKS, mlp(), 2, 0), "`gate_features` must be at least 1, got 0"),
    "no shared": (lambda: CGC(TASKS, mlp(), 0, 1, 6), "`shared_experts` must be at least 1, got 0"),
    "no own": (lambda: CGC(TASKS, mlp(), 1, 0, 6), "`task_experts` must be at least 1, got 0"),
    "no level": (
        lambda: PLE(TASKS, [], gate_features=[]),
        "`experts` must name at least one level",
    ),
    "levels": (
        lambda: PLE(TASKS, [mlp(), mlp(4)], gate_features=[6]),
        r"`gate_features` must have a number for each of the 2 levels, got \[6\]",
    ),
    "gate of levels": (
        lambda: PLE(TASKS, [mlp(), mlp(4)], gate=mlp()),
        "`gate` must be None with several levels",
    ),
    "heads": (
        lambda: TaskAttention(TASKS, mlp()(), mlp(4), 4, attention_heads=3),
        "`attention_heads` must be a divisor of `features`, 4, got 3",
    ),
    "features": (lambda: TaskAttention(TASKS, mlp()(), mlp(4), 0), "`features` must be at least 1"),
    "stem": (lambda: TableEmbedding(0), "must name at least one column"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def sizes(*widths: int) -> Callable[[], nn.Module]:
    """Makes linear layers of each of these widths in turn."""
    left = list(widths)
    return lambda: nn.Linear(INPUTS, left.pop(0))


MISFITS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "gate": (
        lambda: MMoE(TASKS, mlp(), gate_features=7),
        torch.zeros(5, INPUTS),
        r"`gate_features` must be the number of values of a sample, 6 in \[5, 6\], got 7",
    ),
    "a gate on a mapping": (
        lambda: MMoE(TASKS, table_mlp, gate_features=7),
        ROWS,
        "`gate_features` is for a gate that reads a tensor, got dict",
    ),
    "logits": (
        lambda: MMoE(TASKS, mlp(), 3, gate=mlp()),
        torch.zeros(5, INPUTS),
        r"a logit for each expert, \[batch, 3\], got \[5, 4\]",
    ),
    "experts": (
        lambda: MMoE(TASKS, sizes(4, 5), 2, gate_features=INPUTS),
        torch.zeros(5, INPUTS),
        r"All experts must have outputs of one shape, got \[5, 4\] and \[5, 5\]",
    ),
    "channels": (
        lambda: CrossStitch(TASKS, [mlp(), mlp(4)], channels=[5]),
        torch.zeros(5, INPUTS),
        r"Stage 0 must have outputs \[batch, channels, ...\].*5 of them, got \[5, 4\]",
    ),
    "extractor": (
        lambda: TaskAttention(TASKS, mlp()(), mlp(4, 3), 4),
        torch.zeros(5, INPUTS),
        r"`extractor` must map to \[batch, 4\].*got \[5, 3\] for task 'a'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    make, given, words = MISFITS[case]
    with pytest.raises(ValueError, match=words):
        dict(make()(given))


def test_a_task_that_the_encoder_does_not_know_is_refused() -> None:
    made = module("MMoE")
    made.encoder = MMoE(["a", "c"], mlp(), gate_features=INPUTS).double()
    with pytest.raises(KeyError, match=r"features of the tasks \['a', 'c'\], got 'b'"):
        fit(made, [], loader())


# The picture.


def test_the_picture_of_the_attention(tmp_path: Path) -> None:
    net = module("attention").encoder
    weights = net.attention_weights(inputs())
    means = attention_picture(weights, TASKS, tmp_path / "new" / "map.png")
    torch.testing.assert_close(means, weights.mean((0, 1)))
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`weights` must be \[..., 3, 3\], got \[5, 2, 2, 2\]"):
        attention_picture(weights, ["a", "b", "c"], tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"`path` must be the path of a .png file"):
        attention_picture(weights, TASKS, tmp_path / "map.pdf")
