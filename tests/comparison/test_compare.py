"""`flatmtl compare` on a project that is no MultiTaskModule."""

import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

import lightning_flatmtl
from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison import compare as room
from lightning_flatmtl.comparison.comparison import Comparison, compare
from lightning_flatmtl.comparison.curves import TRAIN_LOSS, read_curves
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.jobs import State
from lightning_flatmtl.comparison.record import RunRecord
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.functional import delta_m
from tests.comparison.project import BASE, Data, InProcess, Net, write

pytestmark = [
    pytest.mark.usefixtures("launcher"),
    pytest.mark.filterwarnings(
        "ignore:The dirpath has changed",
        "ignore:Checkpoint directory",
        "ignore:.*does not have many",
    ),
]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_whole_of_it(tmp_path: Path, launcher: InProcess) -> None:
    results = compare(write(tmp_path))
    assert len(results) == 2 * (3 + 2)
    assert len(launcher.started) == len(results) + 1  # the rehearsal
    assert {row["status"] for row in results} == {"done"}
    written = rows(tmp_path / "out")
    assert list(written[0])[:6] == [
        "method", "task", "seed", "status", "hash", "seconds_per_step",
    ]  # fmt: skip
    assert {"test_size_error", "test/sign/hits", "test/loss", "test/delta_m"} <= set(written[0])
    for row, line in zip(results, written, strict=True):
        assert line["method"] == row["method"]
        assert float(line["seconds_per_step"]) > 0
        assert int(line["parameters"]) == row["parameters"] > 0
        assert float(line["test/sign/hits"]) == row["test/sign/hits"]
    single = {(r["task"], r["seed"]): r for r in results if r["method"] == "single-task"}
    for row in results:
        if row["method"] != "single-task":
            names = {"test_size_error": "size", "test/sign/hits": "sign"}
            base = {name: single[task, row["seed"]][name] for name, task in names.items()}
            expected = delta_m(
                {name: row[name] for name in names},
                base,
                {"test_size_error": False, "test/sign/hits": True},
            )
            assert row["test/delta_m"] == expected
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = summary["methods"]["F-CAGrad"]["test/sign/hits"]
    values = [r["test/sign/hits"] for r in results if r["method"] == "F-CAGrad"]
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert summary["cost_relative_to"] == "LS"
    assert summary["methods"]["LS"]["cost"]["mean"] == pytest.approx(1, abs=0.9)
    table = (tmp_path / "out/table.md").read_text()
    assert table == results.markdown
    assert re.search(r"^\| single-task \|", table, re.MULTILINE)
    assert "size error ↓" in table
    assert "Delta_m [%] ↑" in table
    assert (tmp_path / "out/table.tex").read_text().count(r"\\") == 5


def test_a_run_is_the_training_that_it_says(tmp_path: Path) -> None:
    """The same numbers as by hand, with the epoch of the smallest validation loss."""
    from lightning_flatmtl.aggregators import CAGrad

    results = compare(write(tmp_path, seeds=[3], single_task=False, tasks=None))
    pl.seed_everything(3)
    best = pl.callbacks.ModelCheckpoint(tmp_path / "hand", monitor="val/loss")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CAGrad(), best],
        default_root_dir=tmp_path,
    )
    model, data = Net(), Data(seed=3)
    trainer.fit(model, data)
    (expected,) = trainer.test(model, data, ckpt_path="best", verbose=False)
    (row,) = (row for row in results if row["method"] == "CAGrad")
    assert {name: row[name] for name in expected} == expected


def test_a_single_task_is_trained_alone(tmp_path: Path) -> None:
    """The head of the other task stays as it began, and the trunk follows one loss."""
    results = compare(write(tmp_path, methods={"LS": []}, seeds=[3], select="last"))
    paths = {
        row["task"]: tmp_path / f"out/runs/single-task-{row['task']}-seed3-{row['hash'][:8]}"
        for row in results
        if row["task"]
    }
    weights = {
        task: torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for task, path in paths.items()
    }

    class Alone(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["losses"]["size"]

    pl.seed_everything(3)
    model = Alone()
    begun = model.heads["sign"].weight.detach().clone()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Data(seed=3))
    assert torch.equal(weights["size"]["heads.sign.weight"], begun)
    for name, value in model.state_dict().items():
        assert torch.allclose(weights["size"][name], value, atol=1e-6), name


def test_what_is_done_is_kept(tmp_path: Path, launcher: InProcess) -> None:
    path = write(tmp_path, seeds=[3])
    first = compare(path)
    launcher.started.clear()
    again = compare(path)
    assert launcher.started == []
    assert again.to_csv() == first.to_csv()
    write(tmp_path, seeds=[3, 4], methods={"LS": [], "MGDA": ["MGDA"]})
    more = compare(path)
    assert len(launcher.started) == 2 + 1 + 2  # a seed of all three, and MGDA's first
    assert [row for row in more if row["method"] == "LS" and row["seed"] == 3] == [
        row for row in first if row["method"] == "LS"
    ]


def test_curves_have_validations_where_there_was_one(tmp_path: Path, launcher: InProcess) -> None:
    path = write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False)
    given = ["--trainer.max_epochs=5", "--trainer.check_val_every_n_epoch=2"]
    compare(path, *given)
    (folder,) = (tmp_path / "out/runs").glob("LS-*")
    curves = read_curves(folder / "curves.csv")
    assert list(curves["val/loss"]) == [1, 3]
    assert list(curves[TRAIN_LOSS]) == [0, 1, 2, 3, 4]


class OwnNames(Net):
    """Validation logs what does not begin with "val", and a name of training's."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.log("both", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("both", -1.0)
        self.log("dev/loss", self._losses(batch)[1]["size"])
        self.log("dev/same", 1.0)


def test_curves_do_not_ask_for_names(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path))
    trainer = pl.Trainer(
        max_epochs=5,
        check_val_every_n_epoch=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    trainer.fit(OwnNames(), Data(seed=3))
    curves = read_curves(record.folder.curves)
    assert list(curves["dev/loss"]) == [1, 3]
    assert curves["dev/same"] == {1: 1.0, 3: 1.0}
    assert curves["both"] == {epoch: float(epoch) for epoch in range(5)}
    assert list(curves["train_loss"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("callbacks", [[], ["CAGrad"]], ids=["plain", "taken over"])
def test_a_broken_run_goes_on_where_it_was(
    tmp_path: Path, callbacks: list[str], launcher: InProcess
) -> None:
    """With shuffling, dropout and BatchNorm; the best epoch may be before the break."""
    whole = compare(write(tmp_path, methods={"M": callbacks}, seeds=[3], single_task=False))
    (folder,) = (tmp_path / "out/runs").glob("M-*")
    kept = (folder / "curves.csv").read_text().splitlines()
    broken = tmp_path / "broken"
    broken.mkdir()
    path = write(broken, methods={"M": callbacks}, seeds=[3], single_task=False)
    comparison = Comparison(Settings.load(path))
    comparison.prepare()
    (job,) = comparison.jobs
    config = yaml.safe_load(job.folder.config.read_text())
    fault = {"class_path": "tests.comparison.project.Raises", "init_args": {"epoch": 2}}
    broke = dict(config, trainer={**config["trainer"]})
    broke["trainer"]["callbacks"] = [fault, *config["trainer"]["callbacks"]]
    job.folder.config.write_text(yaml.safe_dump(broke))
    assert launcher.start(job.folder).status() == 1
    assert job.folder.resume.is_file()
    assert job.folder.result is None
    again = compare(path)
    (before,), (after,) = whole, again
    timed = {"seconds_per_step", "peak_memory_mib"}
    assert {k: v for k, v in before.items() if k not in timed} == {
        k: v for k, v in after.items() if k not in timed
    }
    (folder,) = (broken / "out/runs").glob("M-*")
    assert (folder / "curves.csv").read_text().splitlines() == kept


def test_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    fault = "tests.comparison.project.Raises"
    methods = {
        "LS": [],
        "broken": [fault],
        "full": [{"class_path": fault, "init_args": {"error": "OSError"}}],
        "CAGrad": ["CAGrad"],
    }
    path = write(tmp_path, methods=methods, seeds=[3], single_task=False)
    results = compare(path)
    assert [row["status"] for row in results] == ["done", "failed", "failed", "done"]
    assert results[1]["error"] == "ValueError: a fault"
    assert results[2]["error"] == "OSError: [Errno 28] No space left"
    assert "- broken, seed 3: ValueError: a fault" in results.markdown
    assert [row["status"] for row in rows(tmp_path / "out")] == [r["status"] for r in results]
    again = compare(path, only=["LS"])
    assert [row["error"] for row in again] == [row["error"] for row in results]


def test_a_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False)
    comparison = Comparison(Settings.load(path))
    comparison.prepare()
    (job,) = comparison.jobs
    other = RunFolder(job.folder.path)
    assert other.claim()
    job.look()
    assert job.state is State.ELSEWHERE
    main_folder = str(job.folder.config)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={main_folder}"])
    assert stopped.value.code == RunRecord.ELSEWHERE
    other.release()
    job.look()
    assert job.state is State.QUEUED


def test_missing_data_fail_in_words(tmp_path: Path) -> None:
    base = {**BASE, "data": {**BASE["data"], "init_args": {"path": "nowhere.csv"}}}
    results = compare(write(tmp_path, base, seeds=[3], single_task=False))
    assert {row["status"] for row in results} == {"failed"}
    assert "nowhere.csv" in results[0]["error"]
    assert "nowhere.csv" in results.markdown


def test_only_some_methods(tmp_path: Path, launcher: InProcess) -> None:
    path = write(tmp_path, seeds=[3])
    results = compare(path, only=["CAGrad"])
    assert len(launcher.started) == 2
    assert {r["method"]: r["status"] for r in results} == {
        "single-task": "queued",
        "LS": "queued",
        "CAGrad": "done",
        "F-CAGrad": "queued",
    }
    assert "Not done yet: single-task (2), LS (1), F-CAGrad (1)." in results.markdown


def test_the_mean_of_the_last_epochs(tmp_path: Path) -> None:
    """The same as testing after every epoch."""
    path = write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False)
    each = []
    for epochs in (2, 3):
        (row,) = compare(
            {**yaml.safe_load(path.read_text()), "config": str(tmp_path / "base.yaml")}
            | {"select": "last", "output": str(tmp_path / f"{epochs}")},
            f"--trainer.max_epochs={epochs}",
        )
        each.append(row["test_size_error"])
    write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False, select={"mean_of_last": 2})
    (row,) = compare(path)
    assert row["test_size_error"] == pytest.approx(statistics.mean(each), rel=1e-12)


def test_figures_of_the_training_in_the_table(tmp_path: Path) -> None:
    metrics = ["sign/hits", "val/sign/loss"]
    results = compare(
        write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False, metrics=metrics)
    )
    assert "val sign loss ↓" in results.markdown
    assert results[0]["val/sign/loss"] > 0
    assert "test_size_error" in results[0]  # in the rows, but not in the table
    assert "size error" not in results.markdown


def test_a_dry_run_prints_lines_and_trains_nothing(
    tmp_path: Path, launcher: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, seeds=[3])
    main(["compare", f"--config={path}", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert launcher.started == []
    assert len(lines) == 5
    for line in lines:
        (config,) = re.fullmatch(r"flatmtl fit --config (\S+)", line).groups()  # type: ignore[union-attr]
        main(["fit", f"--config={config}"])
    capsys.readouterr()
    main(["compare", f"--config={path}"])
    assert len(launcher.started) == 0
    assert "| F-CAGrad |" in capsys.readouterr().out


def test_further_arguments_go_to_every_run(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=[3], select="last")
    results = compare(path, "--trainer.max_epochs=1", "--model.lr=0.1")
    assert {row["epochs"] for row in results} == {1}
    for config in (tmp_path / "out/runs").glob("*/run.yaml"):
        assert yaml.safe_load(config.read_text())["model"]["init_args"]["lr"] == 0.1


def test_baselines_for_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, methods=None, seeds=[3, 4])
    main(["baselines", f"--config={path}"])
    found = lightning_flatmtl.metrics.load_baselines(tmp_path / "out/baselines.yaml")
    assert set(found) == {"test_size_error", "sign/hits"}
    done = [row for row in rows(tmp_path / "out") if row["task"] == "sign"]
    assert found["sign/hits"] == pytest.approx(
        statistics.mean(float(row["test/sign/hits"]) for row in done)
    )
    assert "sign/hits: 0." in capsys.readouterr().out


def test_files_of_callbacks_are_each_runs_own(tmp_path: Path) -> None:
    conflict = {"class_path": "GradientConflict", "init_args": {"csv": "{run}/conflict.csv"}}
    compare(write(tmp_path, methods={"CAGrad": ["CAGrad", conflict]}, seeds=[3], single_task=False))
    (found,) = (tmp_path / "out/runs").glob("*/conflict.csv")
    assert found.parent.name.startswith("CAGrad-seed3-")


def test_it_is_public() -> None:
    assert lightning_flatmtl.compare is room
