"""MTAN by itself, and in the engine: what is shared, what a pass runs, Algorithm 1."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_flatmtl import DepthTask, MultiTaskModule, NormalsTask, SegmentationTask, TaskSAM
from lightning_flatmtl.aggregators import MGDA
from lightning_flatmtl.models import MTAN, DenseHead
from tests import naive
from tests.helpers import Calls, Pairs, assert_identical, fit, sgd
from tests.models.test_segnet import count

NAMES = ("segmentation", "depth", "normals")
FILTERS = (3, 4)


def module(names: tuple[str, ...] = NAMES, known: tuple[str, ...] = NAMES) -> MultiTaskModule:
    torch.manual_seed(0)
    made = {
        "segmentation": SegmentationTask("segmentation", 4, in_channels=3),
        "depth": DepthTask("depth", in_channels=3),
        "normals": NormalsTask("normals", in_channels=3),
    }
    encoder = MTAN(known, filters=FILTERS)
    return MultiTaskModule(encoder, [made[name] for name in names], sgd).double()


def batches(n: int = 2) -> DataLoader:
    g = torch.Generator().manual_seed(1)
    targets = {
        "segmentation": torch.randint(-1, 4, (n, 8, 8), generator=g),
        "depth": torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64),
        "normals": torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64),
    }
    images = torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64)
    return DataLoader(Pairs(images, targets), batch_size=2)


def owner(name: str) -> str | None:
    """Whose a parameter is, by its name; ``None`` if it is shared."""
    parts = name.split(".")
    if parts[0] == "heads":
        return parts[1]
    return parts[2] if parts[1] == "attention" else None


def test_as_many_parameters_as_the_published_network():
    """44.23 million; the published module has three scales of a loss weighting besides."""
    with torch.device("meta"):
        net, heads = MTAN(NAMES), [DenseHead(64, channels) for channels in (13, 1, 3)]
    assert count(net, *heads) == 44_229_073
    assert count(net.segnet) == 24_981_069 - count(heads[0])


def test_a_map_of_features_for_every_task():
    features = MTAN(NAMES, 1, filters=(4, 6, 8))(torch.randn(2, 1, 16, 24))
    assert list(features) == list(NAMES)
    assert len(features) == 3
    assert "edges" not in features
    assert {x.shape for x in features.values()} == {(2, 4, 16, 24)}
    with pytest.raises(KeyError, match="edges"):
        features["edges"]


def test_with_open_masks_it_is_the_segnet():
    net = MTAN(["a"], filters=(3, 4, 5)).eval()
    for mask in [*net.attention["a"].down, *net.attention["a"].up]:
        nn.init.constant_(mask[-2].bias, 100.0)  # of the normalisation before the sigmoid
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(images)["a"], net.segnet(images))


def test_a_closed_mask_lets_nothing_through():
    net = MTAN(["a", "b"], filters=(3, 4)).eval()
    nn.init.constant_(net.attention["a"].up[0][-2].bias, -200.0)
    features = net(torch.randn(2, 3, 8, 8))
    assert not features["a"].any()
    assert features["b"].any()


def test_the_graph_is_cut_at_the_shared_maps():
    features = MTAN(NAMES, filters=FILTERS)(torch.randn(1, 3, 8, 8))
    tensors = pytree.tree_leaves(features)
    assert len(tensors) == 4 * len(FILTERS)
    cut = pytree.tree_map_only(Tensor, Tensor.detach, features)
    assert torch.equal(cut["depth"], features["depth"])
    names = {n for n, p in features._model.named_parameters() if p in reached(cut["depth"])}
    assert {n.partition(".")[0] for n in names} == {"attention", "between_down", "between_up"}


def reached(output: Tensor) -> set[Any]:
    from lightning_flatmtl.engine.partition import reached_parameters

    return reached_parameters([output])


@pytest.mark.parametrize("sam", [None, {}, {"point": "joint"}])
def test_each_attention_belongs_to_its_task_and_all_else_is_shared(sam):
    made = module()
    callbacks = [MGDA(), *([TaskSAM(0.05, **sam)] if sam is not None else [])]
    fit(made, callbacks, batches())
    partition, params = made.engine.partition, dict(made.named_parameters())
    for task in NAMES:
        expected = {n for n in params if owner(n) == task}
        found = partition.head(task, list(params.values()))
        assert {n for n, p in params.items() if any(p is q for q in found)} == expected
    shared = partition.shared(list(params.values()))
    expected = {n for n in params if owner(n) is None}
    assert {n for n, p in params.items() if any(p is q for q in shared)} == expected
    assert {n.split(".")[1] for n in expected} == {"segnet", "between_down", "between_up"}


@pytest.mark.parametrize("point", ["separate", "joint"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_trained_as_algorithm_1_says(point, adaptive):
    made, settings = module(), {"rho": 0.05, "adaptive": adaptive, "point": point}
    by_hand = copy.deepcopy(made)
    fit(made, [MGDA(), TaskSAM(**settings)], batches(4))
    names = [n for n, _ in by_hand.named_parameters()]
    heads = {task: [n for n in names if owner(n) == task] for task in NAMES}
    shared = [n for n in names if owner(n) is None]
    net, optimizer = Losses(by_hand), sgd(by_hand.parameters())
    for batch in batches(4):
        at = {n: p.detach().clone() for n, p in by_hand.named_parameters()}
        losses = {task: net.of(task, batch) for task in NAMES}
        grads = naive.f_mtl_gradients(losses, at, shared, heads, naive.mgda, **settings)
        for n, p in by_hand.named_parameters():
            p.grad = grads[n]
        optimizer.step()
    for (name, ours), theirs in zip(made.named_parameters(), by_hand.parameters(), strict=True):
        # The gradients of biases before a normalisation are 0 but for rounding.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13, msg=name)


class Losses(nn.Module):
    """The losses of a batch, one at a time, with nothing of the package's passes."""

    def __init__(self, made: MultiTaskModule) -> None:
        super().__init__()
        self.made = made

    def forward(self, task: str, batch: Any) -> Tensor:
        x, targets = batch
        predictions = self.made.heads[task](self.made.encoder(x)[task])
        (found,) = (t for t in self.made.tasks if t.name == task)
        return found.loss(predictions, targets[task])

    def of(self, task: str, batch: Any) -> Any:
        def loss(params: dict[str, Tensor]) -> Tensor:
            named = {f"made.{n}": p for n, p in params.items()}
            return functional_call(self, named, (task, batch))

        return loss


def test_a_pass_runs_what_its_task_needs():
    """Per batch: once for all, then once for each task; heads run on the maps that are there."""
    made = module()
    segnet = Calls(made.encoder.segnet.encoder_first[0])
    own = {task: Calls(made.encoder.attention[task].down[0]) for task in NAMES}
    fit(made, [MGDA(), TaskSAM(0.05)], batches())
    assert segnet.count == 1 + 3
    assert {task: calls.count for task, calls in own.items()} == dict.fromkeys(NAMES, 3)


def test_statistics_are_those_of_the_clean_pass():
    """The convolutions between the attention modules see every task once a batch."""
    flat, plain = module(), module()
    fit(flat, [MGDA(), TaskSAM(0.05)], batches())
    fit(plain, [MGDA()], batches())
    for (name, ours), theirs in zip(flat.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert flat.encoder.between_down[0][1].num_batches_tracked == 3
    assert flat.encoder.segnet.encoder_first[0][1].num_batches_tracked == 1


def test_a_task_that_is_not_there_costs_nothing():
    made = module(("depth",))
    others = [made.encoder.attention[task] for task in ("segmentation", "normals")]
    before = copy.deepcopy(others)
    calls = [Calls(other.down[0]) for other in others]
    with pytest.warns(UserWarning, match="every trainable parameter to be reached"):
        fit(made, [TaskSAM(0.05)], batches())
    assert not sum(call.count for call in calls)
    for other, was in zip(others, before, strict=True):
        assert_identical(other, was)


@pytest.mark.parametrize("tasks", [[], ["a", "a"], "depth"])
def test_bad_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="`tasks` must be different names, at least one, got"):
        MTAN(tasks)


@pytest.mark.slow
def test_compiled_it_is_the_same():
    images = torch.randn(2, 3, 8, 8)
    net = MTAN(["a"], filters=(2,)).eval()
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(images)["a"], net(images)["a"])
