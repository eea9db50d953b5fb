"""Encoders and tasks of sequences from a YAML file, as ``flatmtl fit`` reads it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_flatmtl.cli import FlatMTLCLI

CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks: [CAGrad, {class_path: TaskSAM, init_args: {rho: 0.05}}]
model:
  class_path: MultiTaskModule
  init_args:
    encoder: %s
    tasks:
      - {class_path: TaggingTask, init_args: {name: tags, in_features: 8, num_classes: 3}}
      - class_path: ClassificationTask
        init_args:
          name: kind
          in_features: 8
          num_classes: 3
          metrics: {f1: {class_path: MacroF1, init_args: {num_classes: 3}}}
      - class_path: MultiLabelTask
        init_args: {name: moods, in_features: 8, num_labels: 2, missing: -1}
      - class_path: RegressionTask
        init_args: {name: age, in_features: 8, loss: huber, missing: .nan}
data:
  class_path: tests.models.test_sequences_yaml.Sequences
"""
ENCODERS = {
    "recurrent": (
        "{class_path: RecurrentEncoder, init_args: {vocabulary: 9, units: 4, kind: gru, "
        "token_tasks: [tags]}}"
    ),
    "transformer": (
        "{class_path: SequenceTransformer, init_args: {vocabulary: 9, features: 8, "
        "positions: sinusoidal, token_tasks: [tags]}}"
    ),
    "hierarchical": (
        "{class_path: HierarchicalEncoder, init_args: {inner: {class_path: RecurrentEncoder, "
        "init_args: {vocabulary: 9, units: 4}}, outer: {class_path: SequenceTransformer, "
        "init_args: {in_features: 8, features: 8}}, token_tasks: [tags]}}"
    ),
}


class Sequences(pl.LightningDataModule):
    """Two batches of four sequences; with ``parts`` each consists of that many."""

    def __init__(self, parts: int = 0) -> None:
        super().__init__()
        self.shape = (4, parts) if parts else (4,)

    def train_dataloader(self) -> DataLoader[Any]:
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 9, (*self.shape, 5), generator=g)
        lengths = torch.randint(0, 6, self.shape, generator=g)
        tags = tokens % 3
        tags[torch.arange(5) >= lengths[..., None]] = -100
        targets = {
            "tags": tags,
            "kind": torch.randint(0, 3, (4,), generator=g),
            "moods": torch.tensor([[0, 1], [-1, 1], [-1, -1], [1, 0]]),
            "age": torch.tensor([0.5, float("nan"), 1.0, -1.0]),
        }
        batch = {"tokens": tokens, "lengths": lengths}, targets
        return DataLoader([batch, batch], batch_size=None)


@pytest.mark.parametrize("name", ENCODERS)
def test_fit(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    path = Path("config.yaml")
    path.write_text(CONFIG % ENCODERS[name])
    parts = ["--data.parts=3"] if name == "hierarchical" else []
    cli = FlatMTLCLI(args=["fit", f"--config={path}", *parts])
    assert cli.trainer.global_step == 2
    assert {"train/tags/f1", "train/kind/f1", "train/moods/f1", "train/age/rmse"} <= set(
        cli.trainer.callback_metrics
    )
    assert all(p.isfinite().all() for p in cli.model.parameters())
