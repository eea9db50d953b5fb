"""The `flatmtl` command on the examples and on files of one's own."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_flatmtl
from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.cli import FlatMTLCLI, main

ALL = sorted((Path(__file__).parents[1] / "examples" / "multidigits").rglob("*.yaml"))
EXAMPLES = [path for path in ALL if "\nmodel:\n" in path.read_text("utf-8")]  # others add to these
SMALL = ["--data.train_pairs=128", "--data.val_pairs=32", "--data.test_pairs=32"]
QUIET = ["--trainer.enable_progress_bar=false"]

CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: CAGrad
    - class_path: TaskSAM
      init_args: {rho: 0.5, adaptive: true, point: joint}
model:
  class_path: MultiTaskModule
  init_args:
    encoder: {class_path: ConvEncoder, init_args: {widths: [4], features: 8}}
    tasks:
      - class_path: Task
        init_args:
          name: left
          head: {class_path: torch.nn.Linear, init_args: {in_features: 8, out_features: 10}}
          loss: {class_path: torch.nn.CrossEntropyLoss}
          metrics:
            accuracy: {class_path: MulticlassAccuracy, init_args: {num_classes: 10}}
            f1: {class_path: MulticlassF1Score, init_args: {num_classes: 10}}
      - class_path: ClassificationTask
        init_args: {name: right, in_features: 8, num_classes: 10}
    optimizer: {class_path: SGD, init_args: {lr: 0.4, momentum: 0.9}}
    lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.5}}
    lr_scheduler_config: {interval: step, frequency: 2}
    gradient_clip_val: 1.0
    baselines: baselines.yaml
data:
  class_path: MultiDigits
  init_args: {train_pairs: 128, val_pairs: 32, test_pairs: 32, batch_size: 32}
"""
BASELINES = """
left: {accuracy: 0.9, f1: 0.8}
right/accuracy: 0.9
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a folder of their own; Lightning calls jsonargparse by its older names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "config.yml").write_text(CONFIG)
    (tmp_path / "baselines.yaml").write_text(BASELINES)
    return tmp_path


def build(*args: str, config: str = "config.yml") -> FlatMTLCLI:
    """Everything built, nothing run."""
    return FlatMTLCLI([f"--config={config}", *args], run=False)


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"ls", "cagrad", "f_ls", "f_cagrad"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    main(["fit", f"--config={path}", "--trainer.fast_dev_run=true", *QUIET])


def test_the_command_knows_all_short_names_by_itself() -> None:
    """In a process of its own: here other tests have imported everything."""
    (path,) = (path for path in EXAMPLES if path.stem == "f_cagrad")
    arguments = ["fit", f"--config={path}", "--trainer.fast_dev_run=true", *QUIET]
    code = f"from lightning_flatmtl.cli import main; main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(lightning_flatmtl.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_validate_test_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (path for path in EXAMPLES if path.stem == "f_cagrad")
    common = [f"--config={path}", *SMALL, *QUIET]
    main(["fit", *common, "--trainer.max_epochs=2"])
    (log,) = folder.rglob("metrics.csv")
    with log.open() as file:
        columns = set(next(csv.reader(file)))
    assert columns >= {"train/left/accuracy", "val/loss", "val/right/loss", "val/right/accuracy"}
    (checkpoint,) = folder.rglob("*.ckpt")
    assert checkpoint.name == "best.ckpt"
    for verb, stage in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        main([verb, *common, f"--ckpt_path={checkpoint}"])
        assert f"{stage}/left/accuracy" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="throws its predictions away"):
        main(["predict", *common, f"--ckpt_path={checkpoint}"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_predictions_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback of the examples; the warnings are errors, so none says that they are lost."""
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    monkeypatch.delitem(sys.modules, "predictions", raising=False)
    writer = ["--trainer.callbacks+=predictions.SavePredictions", "--trainer.callbacks.folder=kept"]
    main(["predict", "--config=config.yml", *writer])
    (path,) = (folder / "kept").iterdir()
    kept = torch.load(path, weights_only=True)
    assert kept["samples"] == list(range(32))
    assert {task: list(out.shape) for task, out in kept["outputs"].items()} == {
        "left": [32, 10],
        "right": [32, 10],
    }


def test_short_names_and_callables() -> None:
    cli = build()
    model = cli.model
    assert type(model) is MultiTaskModule
    assert list(model.tasks[0].metrics) == ["accuracy", "f1"]
    sam = next(c for c in cli.trainer.callbacks if isinstance(c, TaskSAM))
    assert repr(sam.sharpness) == repr(TaskSAM(0.5, adaptive=True, point="joint").sharpness)
    cli.trainer.fit(model, cli.datamodule)
    (group,) = cli.trainer.optimizers[0].param_groups
    assert cli.trainer.global_step == 8
    assert group["momentum"] == 0.9
    assert group["lr"] == pytest.approx(0.4 * 0.5**4)


def test_a_plateau_is_found_by_its_short_name() -> None:
    """Torch's has the same name, but brings no monitor; it is found by its full path."""
    short, full = "ReduceLROnPlateau", "torch.optim.lr_scheduler.ReduceLROnPlateau"
    of_lightning = ["--model.lr_scheduler.monitor=val/loss", "--model.lr_scheduler.patience=3"]
    of_torch = ['--model.lr_scheduler_config={"monitor": "val/right/loss"}']
    for name, more, monitor in (
        (short, of_lightning, "val/loss"),
        (full, of_torch, "val/right/loss"),
    ):
        cli = build(f"--model.lr_scheduler={name}", *more, config=str(EXAMPLES[0]))
        config = cli.model.configure_optimizers()["lr_scheduler"]
        assert isinstance(config["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
        assert isinstance(config["scheduler"], ReduceLROnPlateau) == (name == short)
        assert config["monitor"] == monitor


def test_baselines_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=config.yml", "--trainer.fast_dev_run=true"])
    main(["test", "--config=config.yml"])
    main(["test", "--config=config.yml"])  # the saved configuration is not in the way
    assert "test/delta_m" in capsys.readouterr().out


def printed(*args: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *args, "--print_config"])
    assert stopped.value.code in {0, None}
    return capsys.readouterr().out


@pytest.mark.parametrize("path", [Path("config.yml"), *EXAMPLES[:1]], ids=lambda path: path.stem)
def test_print_config_round_trip(
    path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed(f"--config={path}", capsys=capsys)
    (folder / "printed.yaml").write_text(first)
    assert printed("--config=printed.yaml", capsys=capsys) == first
    content = yaml.safe_load(first)
    assert content["model"]["class_path"] == "lightning_flatmtl.MultiTaskModule"
    main(["fit", "--config=printed.yaml", "--trainer.fast_dev_run=true", *QUIET])


def test_appending_callbacks(folder: Path) -> None:
    ls = next(path for path in EXAMPLES if path.stem == "base")
    cli = build(
        "--trainer.callbacks+=CAGrad",
        "--trainer.callbacks.c=0.9",
        "--trainer.callbacks+=TaskSAM",
        "--trainer.callbacks.rho=0.3",
        config=str(ls),
    )
    shown = [repr(c) for c in cli.trainer.callbacks if isinstance(c, CAGrad | TaskSAM)]
    assert shown == [repr(CAGrad(c=0.9)), repr(TaskSAM(0.3))]
    (folder / "more.yaml").write_text("trainer: {callbacks+: [{class_path: TaskSAM}]}")
    both = FlatMTLCLI([f"--config={ls}", "--config=more.yaml"], run=False)
    assert any(isinstance(c, TaskSAM) for c in both.trainer.callbacks)


@pytest.mark.parametrize("name", ["CAGrad", "TaskSAM", "PCGrad", "IMTL", "MGDA"])
def test_help_of_a_callback(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--trainer.callbacks.help={name}"])
    shown = " ".join(capsys.readouterr().out.split())
    expected = {
        "CAGrad": "Radius of the ball relative to the mean gradient, in ``[0, inf)``",
        "TaskSAM": "Radius of both perturbations",
        "PCGrad": "Seed of the private generator",
        "IMTL": "Learning rate of the scales",
        "MGDA": "normalization",
    }
    assert expected[name] in shown


def test_help_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help=MultiTaskModule"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("Single-task values by", "Batches per optimizer step", "Bound of the gradient"):
        assert part in shown


BAD = "`{}` must be in [0, inf), got -1.0."
NO_CLASS = "There is no class '{}' known by this short name. Did you mean '{}'?"
WRONG = [
    (["--model.rho=3"], "model: MultiTaskModule has no argument 'rho'."),
    (["--trainer.callbacks+=CAGrd"], "trainer.callbacks: " + NO_CLASS.format("CAGrd", "CAGrad")),
    (
        ["--trainer.callbacks+=TaskSam"],
        "trainer.callbacks: " + NO_CLASS.format("TaskSam", "TaskSAM"),
    ),
    (["--model.lr_scheduler=StepR"], "model.lr_scheduler: " + NO_CLASS.format("StepR", "StepLR")),
    (
        ["--trainer.callbacks+=TaskSAM", "--trainer.callbacks.rho=big"],
        "trainer.callbacks.rho: Expected a value of type float, got 'big'.",
    ),
    (
        ["--trainer.max_epochs=many"],
        "trainer.max_epochs: Expected a value of type int, got 'many'.",
    ),
    (
        ["--data.train_pair=3"],
        "data: MultiDigits has no argument 'train_pair'. Did you mean 'train_pairs'?",
    ),
    (["--nonsense=3"], "unrecognized arguments: --nonsense=3"),
    (["--trainer.callbacks+=TaskSAM", "--trainer.callbacks.rho=-1"], BAD.format("rho")),
    (["--model.gradient_clip_val=-1"], BAD.format("gradient_clip_val")),
    (["--model.baselines=nowhere.yaml"], "There is no file of baselines at 'nowhere.yaml'."),
    (
        ["--trainer.gradient_clip_val=1.0"],
        "MultiTaskModule expects `gradient_clip_val` as an argument of its own, got "
        "Trainer(gradient_clip_val=1.0). Write MultiTaskModule(..., gradient_clip_val=1.0) "
        "instead.",
    ),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[args[-1] for args, _ in WRONG])
def test_the_last_line_of_an_error_is_its_reason(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=config.yml", *args])
    assert stopped.value.code == 2
    *above, hint, last = capsys.readouterr().err.splitlines()
    assert last == f"error: {message}"
    assert "--help` lists the arguments; FLATMTL_TRACEBACK=1" in hint
    # Lightning may say which seed and devices it takes, before a constructor refuses.
    assert len(above) <= 5
    assert not any("Traceback" in line or "usage:" in line for line in above)


def test_the_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATMTL_TRACEBACK", "1")
    wrong = ["--trainer.callbacks+=TaskSAM", "--trainer.callbacks.rho=-1"]
    with pytest.raises(ValueError, match="Union subtypes") as raised:
        main(["fit", "--config=config.yml", *wrong])
    assert str(raised.value.__cause__) == BAD.format("rho")
    with pytest.raises(MisconfigurationException, match="`gradient_clip_val` as an argument of"):
        main(["fit", "--config=config.yml", "--trainer.gradient_clip_val=1.0"])
    with pytest.raises(SystemExit):
        main(["fit", "--config=config.yml", "--trainer.callbacks+=TaskSam"])
    assert "usage: flatmtl" in capsys.readouterr().err


class Broken(Callback):
    """Its constructor has a fault of its own."""

    def __init__(self) -> None:
        raise KeyError("a fault")


def test_from_python_the_reason_is_raised() -> None:
    """So is a fault in the code of a constructor, which the command line is not to hide either."""
    with pytest.raises(ValueError, match=re.escape(BAD.format("rho"))):
        build("--trainer.callbacks+=TaskSAM", "--trainer.callbacks.rho=-1")
    with pytest.raises(KeyError, match="a fault"):
        main(["fit", "--config=config.yml", "--trainer.callbacks+=tests.test_cli.Broken"])


def test_an_error_of_the_training_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(MultiTaskModule, "on_train_start", fault)
    with pytest.raises(ValueError, match="a fault"):
        main(["fit", "--config=config.yml"])


def test_the_help_says_what_flatmtl_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "flatmtl trains one network for several tasks" in shown
    assert "Lightning Trainer command line tool" not in shown


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden")
def test_lightnings_own_optimizer_arguments() -> None:
    """They put a `configure_optimizers` on the instance; its monitor is kept as any other."""
    cli = build(
        "--optimizer=Adam",
        "--optimizer.lr=0.01",
        "--lr_scheduler=ReduceLROnPlateau",
        "--lr_scheduler.monitor=val/loss",
        "--lr_scheduler.patience=0",
        "--lr_scheduler.threshold=0.9",
        "--lr_scheduler.factor=0.5",
    )
    for _ in range(2):
        cli.trainer.fit_loop.max_epochs += 1
        cli.trainer.fit(cli.model, cli.datamodule)
        assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] < 0.01


class Subclass(MultiTaskModule):
    """A module of one's own, found by its path."""

    def __init__(self, width: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width


def test_a_subclass_by_its_path(folder: Path) -> None:
    content = yaml.safe_load(CONFIG)
    content["model"]["class_path"] = "tests.test_cli.Subclass"
    content["model"]["init_args"]["width"] = 7
    (folder / "own.yml").write_text(yaml.safe_dump(content))
    cli = build(config="own.yml")
    assert isinstance(cli.model, Subclass)
    assert cli.model.width == 7
    assert [task.name for task in cli.model.tasks] == ["left", "right"]


class Project(LightningModule):
    """An existing project; its LightningCLI knows nothing of this package."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, width)
        self.heads = torch.nn.ModuleDict({t: torch.nn.Linear(width, 1) for t in "ab"})

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        features = self.encoder(batch).tanh()
        losses = {t: head(features).square().mean() for t, head in self.heads.items()}
        return {"loss": losses["a"] + losses["b"], "losses": losses}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=4)


OWN = """
seed_everything: 3
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  gradient_clip_val: 1.0
  callbacks:
    - {class_path: lightning_flatmtl.aggregators.CAGrad, init_args: {c: 0.4}}
    - {class_path: lightning_flatmtl.TaskSAM, init_args: {rho: 0.5}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}
model: {width: 5}
"""


def test_a_projects_own_command_line(folder: Path) -> None:
    """Callbacks from its YAML train like callbacks from Python; plain training differs."""
    (folder / "own.yaml").write_text(OWN)
    trained: dict[str, torch.Tensor] = {}
    for name, more in (("yaml", []), ("plain", ["--trainer.callbacks=[]"])):
        cli = LightningCLI(Project, args=["fit", "--config=own.yaml", *more])
        trained[name] = torch.nn.utils.parameters_to_vector(cli.model.parameters()).detach()
        assert cli.trainer.global_step == 2
        (folder / "config.yaml").unlink()
    seed_everything(3)
    module = Project(width=5)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
        callbacks=[CAGrad(c=0.4), TaskSAM(0.5)],
    ).fit(module)
    by_hand = torch.nn.utils.parameters_to_vector(module.parameters())
    assert torch.equal(trained["yaml"], by_hand)
    assert not torch.equal(trained["plain"], by_hand)
