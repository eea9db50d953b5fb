"""The encoder of a checkpoint, in other modules."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_flatmtl import MultiTaskModule, Task, load_encoder
from lightning_flatmtl.cli import FlatMTLCLI, main
from lightning_flatmtl.models import ConvEncoder
from tests.helpers import data, encoder, module, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("trained")
    model = module()
    made = trainer([ModelCheckpoint(folder, "end")], enable_checkpointing=True)
    made.fit(model, data())
    return model, folder / "end.ckpt"


def new() -> nn.Module:
    torch.manual_seed(9)
    return encoder().double()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_from_a_checkpoint_of_lightning(trained: Any) -> None:
    model, path = trained
    given = new()
    found = load_encoder(path, given)
    assert found is given
    assert_same(found, model.encoder)
    assert_same(load_encoder(str(path), new()), model.encoder)
    assert all(p.requires_grad for p in found.parameters())
    other = MultiTaskModule(found, [Task("c", nn.Linear(5, 1), nn.MSELoss())])
    assert other.backbone is found


@pytest.mark.parametrize(
    "name",
    [
        "encoder.{}",
        "{}",
        "backbone.{}",
        "_orig_mod.encoder.{}",
        "encoder._orig_mod.{}",
        "_forward_module.encoder._fsdp_wrapped_module.{}",
        "module.encoder.{}",
    ],
)
def test_whatever_the_model_was_wrapped_into(trained: Any, name: str, tmp_path: Path) -> None:
    model, _ = trained
    state = {name.format(n): value for n, value in model.encoder.state_dict().items()}
    if "encoder" in name:
        begin = name.partition("encoder")[0]
        state |= {f"{begin}heads.{n}": value for n, value in model.heads.state_dict().items()}
    for content in (state, {"state_dict": state, "epoch": 3}):
        assert_same(load_encoder(content, new()), model.encoder)
    torch.save(state, tmp_path / "weights.pt")
    assert_same(load_encoder(tmp_path / "weights.pt", new()), model.encoder)


def test_out_of_and_into_compiled_encoders(trained: Any) -> None:
    model, _ = trained
    compiled = torch.compile(copy.deepcopy(model.encoder), backend="eager")
    assert any("_orig_mod" in name for name in compiled.state_dict())
    assert_same(load_encoder(compiled.state_dict(), new()), model.encoder)
    into = torch.compile(new(), backend="eager")
    assert_same(load_encoder(model.state_dict(), into)._orig_mod, model.encoder)


def test_a_prefix_may_be_told_and_is_found_by_the_most_names(trained: Any) -> None:
    model, _ = trained

    class Nested(nn.Module):
        """Its own weights begin with `encoder`."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = new()
            self.last = nn.Linear(5, 5)

    source = Nested()
    source.encoder.load_state_dict(model.encoder.state_dict())
    assert_same(load_encoder(source.state_dict(), Nested()), source)
    assert_same(load_encoder({"net.trunk." + k: v for k, v in source.state_dict().items()},
                             Nested(), prefix="net.trunk"), source)  # fmt: skip
    with pytest.raises(ValueError, match="got 'trunk'; they begin with \\['encoder', 'heads'"):
        load_encoder(model.state_dict(), new(), prefix="trunk")


def test_the_last_layer_is_cut_or_kept_as_it_is(trained: Any) -> None:
    model, path = trained
    cut = load_encoder(path, new(), cut="4")
    assert isinstance(cut[4], nn.Identity)
    assert_same(cut[0], model.encoder[0])
    assert cut(torch.zeros(2, 1, 6, 6, dtype=torch.float64)).shape == (2, 64)
    fresh = new()
    kept = copy.deepcopy(fresh[4])
    skipped = load_encoder(path, fresh, skip=["4"])
    assert_same(skipped[4], kept)
    assert_same(skipped[1], model.encoder[1])
    larger = new()
    larger[4] = nn.Linear(64, 7)
    assert load_encoder(path, larger, skip="4")[4].out_features == 7
    without = new()[:4]  # cut already
    assert_same(load_encoder(path, without, cut="4"), model.encoder[:4])
    with pytest.raises(ValueError, match="`cut` must name layers of the encoder, got 'fc'. It has"):
        load_encoder(path, new(), cut="fc")
    with pytest.raises(ValueError, match="`skip` must name layers"):
        load_encoder(path, new(), skip="fc")


def test_what_does_not_fit_is_listed(trained: Any) -> None:
    _, path = trained
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                          nn.Linear(64, 6), nn.Linear(6, 6))  # fmt: skip
    words = (
        "missing in the checkpoint: 5.weight, 5.bias; of another shape: "
        r"4.weight \[5, 64\], expected \[6, 64\], 4.bias \[5\], expected \[6\]"
    )
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=words):
        load_encoder(path, other)
    assert_same(other, before)
    with pytest.warns(UserWarning, match=f"has left out {words}"):
        load_encoder(path, other, strict=False)
    assert not torch.equal(other[0].weight, before[0].weight)
    assert torch.equal(other[5].weight, before[5].weight)
    with pytest.raises(ValueError, match="unknown to the encoder: 4.weight, 4.bias"):
        load_encoder(path, new()[:3])
    with pytest.raises(ValueError, match="Look at `prefix`"):
        load_encoder(path, nn.Linear(2, 2), strict=False)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "nowhere.ckpt", new())
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        load_encoder(tmp_path, new())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a checkpoint or a state_dict, got list"):
        load_encoder(tmp_path / "list.pt", new())
    with pytest.raises(ValueError, match="must have weights under 'state_dict'"):
        load_encoder({"epoch": 1}, new())
    with pytest.raises(TypeError, match="`encoder` must be an nn.Module, got str"):
        load_encoder({"a": torch.ones(1)}, "trunk")  # type: ignore[arg-type]


def test_code_in_a_file_is_not_run(tmp_path: Path, trained: Any) -> None:
    model, _ = trained
    torch.save({"state_dict": model.state_dict(), "more": new()}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="Pass `weights_only=False` if you trust the file"):
        load_encoder(tmp_path / "objects.pt", new())
    assert_same(load_encoder(tmp_path / "objects.pt", new(), weights_only=False), model.encoder)


def test_it_is_built_from_hyperparameters() -> None:
    made = ConvEncoder(widths=(4,), features=8)
    recipe = {"class_path": "lightning_flatmtl.models.ConvEncoder",
              "init_args": {"widths": [4], "features": 8}}  # fmt: skip
    content = {"state_dict": made.state_dict(), "hyper_parameters": {"encoder": recipe}}
    found = load_encoder(content)
    assert isinstance(found, ConvEncoder)
    assert_same(found, made)
    assert load_encoder({**content, "hyper_parameters": {"encoder": new()},
                         "state_dict": new().state_dict()})  # fmt: skip
    with pytest.raises(ValueError, match="`encoder` must be given: neither the hyperparameters"):
        load_encoder({"state_dict": made.state_dict()})


CONFIG = """
trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, accelerator: cpu,
          enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1,
          logger: {class_path: CSVLogger, init_args: {save_dir: runs}}}
model:
  class_path: MultiTaskModule
  init_args:
    encoder: {class_path: ConvEncoder, init_args: {widths: [4], features: 8}}
    tasks:
    - {class_path: ClassificationTask, init_args: {name: left, in_features: 8, num_classes: 10}}
    - {class_path: ClassificationTask, init_args: {name: right, in_features: 8, num_classes: 10}}
data: {class_path: MultiDigits, init_args: {train_pairs: 128, val_pairs: 64, test_pairs: 64}}
"""


def test_from_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    Path("fit.yaml").write_text(CONFIG)
    main(["fit", "--config", "fit.yaml"])
    (path,) = Path("runs").rglob("*.ckpt")
    found = load_encoder(path)  # as the config.yaml of the run says
    assert isinstance(found, ConvEncoder)
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, value in found.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"])
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["encoder"] = {
        "class_path": "lightning_flatmtl.load_encoder",
        "init_args": {"checkpoint": str(path)},
    }
    Path("transfer.yaml").write_text(yaml.safe_dump(config))
    cli = FlatMTLCLI(["--config", "transfer.yaml"], run=False)
    assert_same(cli.model.encoder, found)
