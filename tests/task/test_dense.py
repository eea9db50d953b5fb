"""Tasks with a prediction for every pixel, by themselves and in a module."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from lightning_flatmtl import (
    DepthTask,
    MultiTaskModule,
    NormalsTask,
    SegmentationTask,
    TaskSAM,
)
from lightning_flatmtl.aggregators import MGDA
from lightning_flatmtl.models import DenseHead, UnitLength
from tests.dense import CLASSES
from tests.helpers import Pairs, fit

TASKS = {
    "segmentation": lambda **given: SegmentationTask("segmentation", CLASSES, **given),
    "depth": lambda **given: DepthTask("depth", **given),
    "normals": lambda **given: NormalsTask("normals", **given),
}
UNLABELLED = {"segmentation": -1, "depth": 0.0, "normals": 0.0}


def images(lacking: dict[str, slice], n: int = 4) -> DataLoader:
    """Images of which some have no label of a task at all."""
    g = torch.Generator().manual_seed(0)
    targets = {
        "segmentation": torch.randint(-1, CLASSES, (n, 4, 6), generator=g),
        "depth": torch.rand(n, 1, 4, 6, generator=g),
        "normals": torch.randn(n, 3, 4, 6, generator=g),
    }
    for task, which in lacking.items():
        targets[task][which] = UNLABELLED[task]
    return DataLoader(Pairs(torch.randn(n, 3, 4, 6, generator=g), targets), batch_size=2)


class Steps(pl.Callback):
    """Which tasks each step had, and how far it moved the encoder."""

    def __init__(self) -> None:
        self.tasks: list[set[str]] = []
        self.moved: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = parameters_to_vector(pl_module.encoder.parameters()).detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tasks.append(set(pl_module.last_step.losses))
        after = parameters_to_vector(pl_module.encoder.parameters()).detach()
        self.moved.append(float((after - self.before).norm()))


def module() -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()),
        [make(in_channels=4) for make in TASKS.values()],
        lambda params: torch.optim.SGD(params, lr=0.1),
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_head_is_given_or_made(name) -> None:
    channels = {"segmentation": CLASSES, "depth": 1, "normals": 3}[name]
    x = torch.randn(2, 4, 6, 8)
    for task in (TASKS[name](in_channels=4), TASKS[name](head=nn.Conv2d(4, channels, 1))):
        assert task.head(x).shape == (2, channels, 6, 8)
    for given in ({}, {"in_channels": 4, "head": nn.Identity()}):
        with pytest.raises(ValueError, match="One of `head` and `in_channels` must be given"):
            TASKS[name](**given)


def test_normals_are_of_length_1() -> None:
    predictions = TASKS["normals"](in_channels=4).head(torch.randn(2, 4, 6, 8))
    torch.testing.assert_close(predictions.square().sum(1), torch.ones(2, 6, 8))


def test_a_vector_of_0_stays_and_has_the_gradient_of_the_identity() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = UnitLength()(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert x.grad[1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(
        x.grad[0], torch.tensor([0.8 - 0.6, 0.6 - 0.8]) * torch.tensor([0.8, 0.6]) / 5
    )


def test_lengths_of_half_precision_do_not_overflow() -> None:
    found = UnitLength()(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_the_head_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    first, second = DenseHead(64, 13)
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert second.weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 13)), rel=0.1)
    assert not first.bias.any()
    assert not second.bias.any()


@pytest.mark.parametrize("sam", [{}, {"rho": 0.1}])
def test_a_task_without_labels_is_left_out_of_its_batch(sam) -> None:
    """One that had a loss of 0 would bring a gradient of 0, which MGDA would choose."""
    made, steps = module(), Steps()
    callbacks = [steps, MGDA(), *([TaskSAM(**sam)] if sam else [])]
    lacking = {"depth": slice(0, 2), "normals": slice(0, 1), "segmentation": slice(3, 4)}
    done = fit(made, callbacks, images(lacking), images(lacking))
    assert steps.tasks == [{"segmentation", "normals"}, {"segmentation", "depth", "normals"}]
    assert min(steps.moved) > 1e-6
    expected = {"segmentation/miou", "depth/rel_err", "normals/median"}
    assert all(done.callback_metrics[f"val/{name}"].isfinite() for name in expected)


def test_what_is_logged() -> None:
    done = fit(module(), [], images({}), images({}))
    named = {
        "segmentation": ["miou", "pixel_accuracy"],
        "depth": ["abs_err", "rel_err"],
        "normals": ["mean", "median", "within_11", "within_22", "within_30"],
    }
    for task, names in named.items():
        for name in ["loss", *names]:
            assert done.callback_metrics[f"val/{task}/{name}"].isfinite()


def test_a_label_of_no_class_is_refused() -> None:
    loader = images({})
    loader.dataset.targets["segmentation"][0, 0, 0] = CLASSES
    with pytest.raises(RuntimeError, match="task 'segmentation', with targets .* from -1 to 5"):
        fit(module(), [], loader)


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        SegmentationTask("s", 1, in_channels=4)
