"""Shared and own parts from a YAML file, as `flatmtl fit` reads it."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_flatmtl import models
from lightning_flatmtl.cli import main

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [{"class_path": "CAGrad"}, {"class_path": "TaskSAM"}],
    },
    "data": {
        "class_path": "MultiDigits",
        "init_args": {"train_pairs": 32, "val_pairs": 16, "test_pairs": 16, "batch_size": 16},
    },
}


def conv(channels: int, *widths: int, features: int = 8) -> dict[str, Any]:
    given = {"in_channels": channels, "widths": list(widths), "features": features}
    return {"class_path": "ConvEncoder", "init_args": given}


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    given = {"in_features": inputs, "out_features": outputs}
    return {"class_path": "torch.nn.Linear", "init_args": given}


TRUNK, LAYER = conv(1, 4), linear(8, 8)
ENCODERS: dict[str, dict[str, Any]] = {
    "SoftSharing": {"trunk": TRUNK, "distance": "trace"},
    "CrossStitch": {"stages": [TRUNK, LAYER, LAYER], "channels": [8, 1]},
    "MMoE": {"stem": TRUNK, "expert": LAYER, "experts": 3, "gate_features": 8},
    "CGC": {"expert": TRUNK, "gate": conv(1, 2, features=2)},
    "PLE": {"stem": TRUNK, "experts": [LAYER, LAYER], "gate_features": [8, 8]},
    "TaskAttention": {"trunk": TRUNK, "extractor": LAYER, "features": 8},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_fit_from_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    heads = [
        {
            "class_path": "ClassificationTask",
            "init_args": {"name": task, "in_features": 8, "num_classes": 10},
        }
        for task in ("left", "right")
    ]
    encoder = {"class_path": name, "init_args": {"tasks": ["left", "right"], **ENCODERS[name]}}
    model = {"class_path": "MultiTaskModule", "init_args": {"encoder": encoder, "tasks": heads}}
    Path("config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    seen: list[Any] = []
    made = getattr(models, name)
    forward = made.forward
    monkeypatch.setattr(made, "forward", lambda net, x: seen.append(net) or forward(net, x))
    main(["fit", "--config=config.yaml"])
    net = seen[-1]
    assert type(net) is made
    values = [p.flatten()[0].item() for p in net.parameters() if p.ndim > 1 and p.shape[1] > 3]
    assert len(set(values)) == len(values)  # each copy has weights of its own


def test_every_architecture_is_here() -> None:
    makers = {n for n in models.__all__ if _arguments(getattr(models, n))[:1] == ["tasks"]}
    assert makers - {"MTAN"} == set(ENCODERS)


def _arguments(of: Any) -> list[str]:
    return list(inspect.signature(of).parameters)
