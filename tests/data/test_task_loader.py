"""Loaders of several data sets that take turns."""

import copy
import math
import sys
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.cli import FlatMTLCLI
from lightning_flatmtl.data import CombinedData, MultiDigits, TaskLoader
from tests.helpers import assert_identical, trainer

SIZES = {"a": 40, "b": 120, "c": 1000}


def loaders(shuffle: bool = True, **changes: int) -> dict[str, DataLoader]:
    return {t: DataLoader(range(n), 10, shuffle) for t, n in ({**SIZES, **changes}).items()}


def drawn(loader: TaskLoader, epoch: int = 0) -> list[dict[str, list[int]]]:
    loader.set_epoch(epoch)
    return [{t: part.tolist() for t, part in batch.items()} for batch, _, _ in loader]


def counts(steps: Any) -> Counter[str]:
    return Counter(task for batch in steps for task in batch)


def test_round_robin_goes_on_until_the_longest_is_through() -> None:
    steps = drawn(TaskLoader(loaders(), "round_robin"))
    assert [next(iter(batch)) for batch in steps] == ["a", "b", "c"] * 100
    assert sorted(x for batch in steps for x in batch.get("c", ())) == list(range(1000))
    rounds = [x for batch in steps for x in batch.get("a", ())]
    for begin in range(0, 1000, 40):  # each time all samples, and in another order
        assert sorted(rounds[begin : begin + 40]) == list(range(40))
    assert rounds[:40] != rounds[40:80]


def test_proportional_is_one_epoch_of_every_loader() -> None:
    loader = TaskLoader(loaders(), "proportional", seed=3)
    assert len(loader) == 4 + 12 + 100
    for epoch in range(2):
        steps = drawn(loader, epoch)
        for task, size in SIZES.items():
            assert sorted(x for b in steps for x in b.get(task, ())) == list(range(size))
        assert all(len(batch) == 1 for batch in steps)
    assert drawn(loader, 0) != steps


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, math.inf])
def test_temperature_draws_by_size(temperature: float) -> None:
    weights = np.array(list(SIZES.values())) ** (1 / temperature)
    expected = 100 * weights / weights.sum()
    loader = TaskLoader(loaders(), "temperature", temperature, steps=100)
    assert np.allclose(loader.order.expected(), expected)
    total = np.zeros(3)
    places = np.zeros((100, 3))
    for epoch in range(200):
        loader.set_epoch(epoch)
        plan = loader.order.plan()
        found = np.bincount(plan[:, 0], minlength=3)
        assert (np.abs(found - expected) < 1).all()  # rounded down or up
        assert found.sum() == len(loader) == 100
        total += found
        places += plan == np.arange(3)
    assert np.abs(total / 200 - expected).max() < 0.15
    # Any step has the probabilities: 4.5 standard deviations of a mean over 200 epochs.
    p = expected / 100
    assert (np.abs(places / 200 - p) < 4.5 * np.sqrt(p * (1 - p) / 200) + 1e-9).all()


def test_a_rare_task_is_in_some_epochs() -> None:
    loader = TaskLoader(loaders(c=5000), "temperature", steps=20)
    share = loader.order.expected()[0]
    assert share == pytest.approx(20 * 40 / 5160)
    times = []
    for epoch in range(300):
        loader.set_epoch(epoch)
        times.append((loader.order.plan() == 0).sum())
    assert set(times) == {0, 1}
    assert np.mean(times) == pytest.approx(share, abs=0.08)


def test_several_tasks_at_once_are_different_and_as_often_as_they_should() -> None:
    loader = TaskLoader(loaders(), "temperature", 2.0, steps=60, tasks_per_step=2)
    weights = np.sqrt(list(SIZES.values()))
    assert 2 * weights[2] / weights.sum() > 1  # it would be in more steps than there are
    rest = weights[:2] / weights[:2].sum()
    assert np.allclose(loader.order.expected(), 60 * np.array([*rest, 1.0]))
    steps = drawn(loader)
    assert all(len(batch) == 2 for batch in steps)
    assert counts(steps)["c"] == 60
    turns = TaskLoader(loaders(), "round_robin", tasks_per_step=2, steps=3)
    assert [set(batch) for batch in drawn(turns)] == [{"a", "b"}, {"a", "c"}, {"b", "c"}]


def test_seed_and_epoch_say_all_and_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = [drawn(TaskLoader(loaders(), "temperature", 3.0, seed=5), e) for e in (0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert one == [drawn(TaskLoader(loaders(), "temperature", 3.0, seed=5), e) for e in (0, 1)]
    assert one[0] != one[1] != drawn(TaskLoader(loaders(), "temperature", 3.0, seed=6), 1)
    # A loader with a generator of its own keeps it.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(range(30), 10, shuffle=True, generator=own)
    assert TaskLoader({"a": loader}, seed=1).loaders["a"].sampler.generator is own
    drawn(TaskLoader({"a": loader}, seed=1))
    assert loader.sampler.generator is own


def test_sizes_may_be_given_and_are_needed_where_nobody_knows_them() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(25)

    streams = {"a": DataLoader(Stream(), 10), "b": DataLoader(range(20), 10)}
    loader = TaskLoader(streams, "temperature", steps=8, sizes={"a": 60})
    steps = drawn(loader)
    assert counts(steps) == {"a": 6, "b": 2}
    assert [len(batch["a"]) for batch in steps if "a" in batch] == [10, 10, 5, 10, 10, 5]
    with pytest.raises(ValueError, match="loader of 'a' must have a data set with a length"):
        drawn(TaskLoader(streams, "temperature", steps=8))
    with pytest.raises(ValueError, match="loader of 'a' must have a length.*Pass `steps`"):
        len(TaskLoader(streams, "round_robin"))


def test_what_is_refused() -> None:
    two = loaders()
    for arguments, words in (
        ({"order": "by turns"}, "`order` must be among"),
        ({"temperature": 0.0, "order": "temperature"}, r"`temperature` must be in \(0, inf\]"),
        ({"temperature": math.nan, "order": "temperature"}, "`temperature` must be in"),
        ({"temperature": 2.0}, 'for `order="temperature"` only, got 2.0'),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"tasks_per_step": 4}, r"`tasks_per_step` must be in \[1, 3\]"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"sizes": {"d": 3}}, "`sizes` must be by names among"),
        ({"sizes": {"a": 0}}, r"`sizes` must be numbers in \(0, inf\)"),
    ):
        with pytest.raises(ValueError, match=words):
            TaskLoader(two, **arguments)
    with pytest.raises(ValueError, match="`loaders` must be a mapping"):
        TaskLoader({})
    empty = DataLoader(range(5), 10, drop_last=True)
    with pytest.raises(ValueError, match="The loader of 'b' must have at least one batch"):
        TaskLoader({**two, "b": empty})

    class Nothing(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(RuntimeError, match="The loader of 'a' must have at least one batch"):
        drawn(TaskLoader({"a": DataLoader(Nothing())}, steps=2))


# In a Trainer.


class Diary(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append({task: part[1].flatten().tolist() for task, part in batch.items()})
        self.marks.append(torch.rand(()).item())


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.arange(count, dtype=torch.float64)[:, None] / count)


def for_training(order: Any = "temperature", **settings: Any) -> TaskLoader:
    parts = {
        "small": DataLoader(samples(12, 0), 4, shuffle=True),
        "large": DataLoader(samples(60, 1), 6, shuffle=True),
    }
    if order == "temperature":
        settings.setdefault("temperature", 2.0)
    return TaskLoader(parts, order, **settings)


def net(**settings: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(
        nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh()),
        [Task(t, nn.Linear(6, 1), nn.MSELoss()) for t in ("small", "large")],
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
        **settings,
    ).double()


def test_a_trainer_tells_epochs_limits_and_steps() -> None:
    diary = Diary()
    fitted = trainer([diary, CAGrad(), TaskSAM(0.05)], max_epochs=3)
    fitted.fit(net(accumulate_grad_batches=2), for_training(steps=10))
    loader = for_training(steps=10)
    planned = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        planned += [set(step) for step in loader.order]
    assert [set(step) for step in diary.steps] == planned
    assert fitted.global_step == 15
    assert planned[:10] != planned[10:20]
    limited = Diary()
    short = trainer([limited], max_epochs=2, limit_train_batches=0.5)
    short.fit(net(), for_training(steps=10))
    assert [set(s) for s in limited.steps] == [*planned[:5], *planned[10:15]]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("order", ["temperature", "round_robin", "proportional"])
@pytest.mark.parametrize("at", [4, 13])
def test_a_run_goes_on_in_the_middle_of_an_epoch_bit_for_bit(
    tmp_path: Any, order: Any, at: int
) -> None:
    def run(ckpt: Any = None, **settings: Any) -> tuple[MultiTaskModule, Diary]:
        made, diary = net(), Diary()
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        settings = {"max_epochs": 3, "enable_checkpointing": True, **settings}
        torch.manual_seed(7)
        fitted = trainer([diary, CAGrad(), TaskSAM(0.05), saves], **settings)
        fitted.fit(made, for_training(order, steps=9), ckpt_path=ckpt, weights_only=False)
        return made, diary

    whole, steps = run()
    resumed, rest = run(tmp_path / f"step={at}.ckpt", logger=False)
    assert rest.steps == steps.steps[at:]
    assert rest.marks == steps.marks[at:]
    assert_identical(whole, resumed)


class Resumable:
    """A loader that knows by itself how far it is."""

    def __init__(self, name: float) -> None:
        self.name, self.at = name, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        while self.at < len(self):
            self.at += 1
            yield self.name + self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_loaders_with_a_state_resume_by_it() -> None:
    def made() -> TaskLoader:
        return TaskLoader({"a": Resumable(0), "b": Resumable(10)}, "proportional", steps=12)

    loader = iter(made())
    whole = [batch for batch, _, _ in made()]
    first = [next(loader)[0] for _ in range(7)]
    states = copy.deepcopy(loader._state_dicts())
    again = made()
    again._load_state_dicts(states)
    assert first + [batch for batch, _, _ in again] == whole


def test_combined_data_is_several_data_modules(tmp_path: Any) -> None:
    def module(seed: int, size: int) -> MultiDigits:
        return MultiDigits(size, 20, 20, batch_size=10, seed=seed)

    parts = {"left": module(0, 20), "right": module(1, 200)}
    data = CombinedData(parts, "temperature", temperature=2.0)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, TaskLoader)
    assert len(loader) == 22
    assert loader.order.expected()[0] == pytest.approx(22 / (1 + math.sqrt(10)))
    every = iter(CombinedData(parts).train_dataloader())
    assert len(every) == 20
    assert set(next(every)[0]) == {"left", "right"}
    assert len(iter(data.val_dataloader())) == 2
    with pytest.raises(ValueError, match="must be left out with order 'max_size'"):
        CombinedData(parts, "max_size", temperature=2.0)
    with pytest.raises(ValueError, match="`order` must be among"):
        CombinedData(parts, "sequential")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one data module"):
        CombinedData({})


class Images(pl.LightningDataModule):
    """Images of one task."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples(), 10, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.samples(), 10)

    def samples(self) -> TensorDataset:
        return TensorDataset(torch.rand(self.count, 1, 8, 8), torch.arange(self.count) % 10)


def test_combined_data_comes_from_yaml(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fit.yaml"
    file.write_text("""
trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, accelerator: cpu,
          enable_progress_bar: false, enable_model_summary: false,
          callbacks: [{class_path: CAGrad}, {class_path: TaskSAM}]}
model:
  class_path: MultiTaskModule
  init_args:
    encoder: {class_path: ConvEncoder, init_args: {features: 8}}
    tasks:
    - {class_path: ClassificationTask, init_args: {name: left, in_features: 8, num_classes: 10}}
    - {class_path: ClassificationTask, init_args: {name: right, in_features: 8, num_classes: 10}}
data:
  class_path: CombinedData
  init_args:
    order: temperature
    temperature: .inf
    steps: 6
    modules:
      left: {class_path: tests.data.test_task_loader.Images, init_args: {count: 20}}
      right: {class_path: tests.data.test_task_loader.Images, init_args: {count: 90}}
""")
    cli = FlatMTLCLI(["fit", "--config", str(file)])
    assert cli.trainer.global_step == 6
    assert {"val/left/accuracy", "val/right/accuracy"} <= set(cli.trainer.callback_metrics)
    assert isinstance(cli.datamodule.train_dataloader(), TaskLoader)
