"""`flatmtl tune` on a project that is no MultiTaskModule."""

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchmetrics.classification import BinaryAccuracy

import lightning_flatmtl
from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison import tune as room
from lightning_flatmtl.comparison.curves import read_curves
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import Process
from lightning_flatmtl.comparison.plan import make_plan
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.comparison.tuning.figures import write_figures
from lightning_flatmtl.comparison.tuning.space import Space
from lightning_flatmtl.comparison.tuning.tuning import tune
from tests.comparison.project import BASE, InProcess, Net, write_search

pytest.importorskip("optuna")
pytestmark = [
    pytest.mark.usefixtures("launcher"),
    pytest.mark.filterwarnings(
        "ignore:The dirpath has changed",
        "ignore:Checkpoint directory",
        "ignore:.*does not have many",
    ),
]

ONE = {"methods": {"LS": []}, "search": {"model.lr": {"low": 0.01, "high": 0.1}}}
FAULT = "tests.comparison.project.Raises"


class Scored(Net):
    """Logs a metric whose name does not say its direction."""

    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__(width, lr)
        self.points = BinaryAccuracy()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        outputs, _ = self._losses(batch)
        self.points(outputs["sign"].sigmoid(), batch[2].int())
        self.log("val/points", self.points)
        self.log("val/plain", 1.0)


def params(trials: Any) -> list[dict[str, Any]]:
    """What a trial was and what came of it."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in trials]


def no_test(*_: Any) -> None:
    raise AssertionError("the test data are used")


def test_the_whole_of_it(
    tmp_path: Path, launcher: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Net, "test_step", no_test)
    trials = tune(write_search(tmp_path))
    assert len(launcher.started) == 1 + 2 * 2  # the rehearsal, and the same budget for all
    assert [row["state"] for row in trials] == ["complete"] * 4
    with (tmp_path / "out/trials.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["value"]) for row in written] == [row["value"] for row in trials]
    assert {row["method"] for row in trials if "TaskSAM.rho" in row} == {"F-LS"}
    for row in trials:
        slug = f"{row['method']}-{row['trial']}-seed3-*"
        (folder,) = (tmp_path / "out/trials").glob(slug)
        found = yaml.safe_load((folder / "run.yaml").read_text())
        assert found["model"]["init_args"]["lr"] == row["model.lr"]
        curve = read_curves(folder / "curves.csv")["val/loss"]
        assert row["value"] == curve[2] == RunFolder(folder).result["final"]["val/loss"]  # type: ignore[index]
        assert not list(folder.rglob("*.ckpt"))
        rho = found["trainer"]["callbacks"][0].get("init_args", {}).get("rho")
        assert rho == row.get("TaskSAM.rho")
    rhos = [row["TaskSAM.rho"] for row in trials if "TaskSAM.rho" in row]
    assert all(0 < rho < 1 for rho in rhos)  # a float, though its bounds are written as integers
    assert len({row["model.lr"] for row in trials if row["method"] == "LS"}) == 2


def test_the_best_go_into_a_comparison(tmp_path: Path) -> None:
    trials = tune(
        write_search(tmp_path, compare={"seeds": [7], "single_task": True, "tasks": ["size"]}),
        "--trainer.max_epochs=1",
    )
    assert trials.compare == tmp_path / "out/compare.yaml"
    settings = Settings.load(trials.compare)
    assert settings.seeds == (7,)
    runs = {run.method: run.config for run in make_plan(settings).runs}
    assert list(runs) == ["single-task", "LS", "F-LS"]
    for method in ("LS", "F-LS"):
        own = [row for row in trials if row["method"] == method]
        best = min(own, key=lambda row: row["value"])
        found = trials.best[method]
        assert (found.trial, found.value) == (best["trial"], best["value"])
        assert runs[method]["model"]["init_args"]["lr"] == best["model.lr"]
        assert runs[method]["trainer"]["max_epochs"] == 1
        assert f"# {method}: trial {best['trial']}, val/loss {best['value']:.6g}: " in (
            trials.compare.read_text()
        )
    assert runs["F-LS"]["trainer"]["callbacks"][0]["init_args"]["rho"] == next(
        row["TaskSAM.rho"]
        for row in trials
        if row["method"] == "F-LS" and row["trial"] == trials.best["F-LS"].trial
    )
    assert runs["single-task"]["model"]["init_args"]["lr"] == 0.05  # that of the base


class Broken(InProcess):
    """Ctrl-C at the n-th start, before or after the run."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self.at, self.after = at, after

    def start(self, folder: RunFolder) -> Process:
        if len(self.started) == self.at and not self.after:
            raise KeyboardInterrupt
        process = super().start(folder)
        if len(self.started) == self.at and self.after:
            raise KeyboardInterrupt
        return process


@pytest.mark.parametrize("after", [False, True], ids=["begun", "done but not told"])
def test_a_broken_search_goes_on(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(write_search(tmp_path, **ONE, trials=2))
    folder = tmp_path / "broken"
    folder.mkdir()
    path = write_search(folder, **ONE, trials=2)
    broken = Broken(2, after)
    name = "lightning_flatmtl.comparison.tuning.tuning.make_launcher"
    with monkeypatch.context() as patched:
        patched.setattr(name, lambda *_: broken)
        with pytest.raises(KeyboardInterrupt):
            tune(path)
    with (folder / "out/trials.csv").open() as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states == (["running"] if after else ["complete", "running"])
    again = tune(path)
    assert params(again) == params(whole)  # the same suggestions, as if unbroken
    launcher = InProcess()
    monkeypatch.setattr(name, lambda *_: launcher)
    assert params(tune(path)) == params(whole)
    assert launcher.started == []
    if not after:
        more = tune(write_search(folder, **ONE, trials=3))
        assert params(more)[:2] == params(whole)
        assert len(more) == 3


def test_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    methods = {"LS": [], "broken": [{"class_path": FAULT, "init_args": {"epoch": 9}}]}
    search = {"Raises.epoch": {"choices": [0, 9]}}
    path = write_search(
        tmp_path, methods=methods, search=search, trials=5, sampler="BruteForceSampler"
    )
    trials = tune(path)
    found = {(row["method"], row.get("Raises.epoch")): row for row in trials}
    assert len(trials) == len(found) == 3  # nothing to search; and both choices, none twice
    assert found["LS", None]["state"] == found["broken", 9]["state"] == "complete"
    assert found["broken", 0]["state"] == "failed"
    assert found["broken", 0]["error"] == "ValueError: a fault"
    assert "broken: 1 failed: ValueError: a fault" in trials.remarks
    assert "LS: has none of the searched arguments, so it has one trial." in trials.remarks
    assert trials.best["broken"].arguments == {"Raises.epoch": 9}
    assert params(tune(path)) == params(trials)


def test_what_is_not_finite_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {"model.lr": {"choices": [1e30]}}
    path = write_search(tmp_path, methods={"LS": []}, search=search, trials=1)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", f"--config={path}"])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "LS, trial 0 (model.lr 1e+30): failed: FloatingPointError: val/loss was not" in said
    assert not (tmp_path / "out/compare.yaml").exists()


def test_what_is_pruned_ends(tmp_path: Path) -> None:
    pruner = {"class_path": "ThresholdPruner", "init_args": {"upper": 0.0, "n_warmup_steps": 1}}
    trials = tune(write_search(tmp_path, **ONE, pruner=pruner, seeds=[3, 4], trials=2))
    assert [row["state"] for row in trials] == ["pruned", "pruned"]
    for folder in (tmp_path / "out/trials").glob("LS-*-seed3-*"):
        curve = read_curves(folder / "curves.csv")["val/loss"]
        assert list(curve) == [0, 1]
        assert curve[1] in [row["value"] for row in trials]
    assert not list((tmp_path / "out/trials").glob("LS-*-seed4-*"))
    assert trials.best == {}


def test_the_mean_of_several_seeds_at_the_selected_epochs(tmp_path: Path) -> None:
    select = {"monitor": "val/size/loss", "mode": "min"}
    (row,) = tune(write_search(tmp_path, **ONE, seeds=[3, 4], select=select, trials=1))
    values = []
    for folder in sorted((tmp_path / "out/trials").glob("LS-0-seed*")):
        curves = read_curves(folder / "curves.csv")
        best = min(curves["val/size/loss"], key=lambda epoch: curves["val/size/loss"][epoch])
        values.append(curves["val/loss"][best])
    assert len(values) == 2
    assert row["value"] == pytest.approx(statistics.mean(values), rel=1e-12)


def test_the_direction_of_a_metric(tmp_path: Path) -> None:
    base = {**BASE, "model": {"class_path": "tests.comparison.test_tune.Scored"}}
    trials = tune(write_search(tmp_path, base, **ONE, metric="val/points", trials=2))
    assert trials.best["LS"].value == max(row["value"] for row in trials)
    assert "| method | val/points ↑ |" in trials.markdown
    with pytest.raises(ValueError, match="`direction` must be given for 'val/plain', which does"):
        tune(write_search(tmp_path, base, **ONE, metric="val/plain"), output=tmp_path / "other")


def test_only_some_methods(
    tmp_path: Path, launcher: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_search(tmp_path, trials=1)
    main(["tune", f"--config={path}", "--dry_run", "--only", "LS", "F-LS"])
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"flatmtl tune --config {path} --only LS",
        f"flatmtl tune --config {path} --only F-LS",
    ]
    assert "# F-LS: 0 of 1 trials begun" in said.err
    assert launcher.started == []
    assert not (tmp_path / "out").exists()
    trials = tune(path, only=["F-LS"])
    assert {row["method"] for row in trials} == {"F-LS"}
    assert "LS: 1 not begun." in trials.remarks


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"metric": "test/loss"}, "`metric` must be a figure of the validation data, got 'test/loss'"),
    ({"metric": "train_loss"}, "chosen by the training data are those that overfit"),
    ({"metric": None}, "`metric` must be the name of a figure of the validation data"),
    ({"metric": "val/los"}, "`metric` must be logged in validation, got 'val/los'. Did you mean"),
    ({"select": {"monitor": "val/los"}}, "`monitor` of `select` must be logged in validation"),
    ({"search": {"GradVac.beta": {"low": 0, "high": 1}}}, "got 'GradVac.beta', which none has."),
    (
        {"search": {"TaskSAM.rh": {"low": 0, "high": 1}}},
        "got 'TaskSAM.rh', which none has. Did you mean 'TaskSAM.rho'?",
    ),
    (
        {"search": {"model.lrr": {"low": 0, "high": 1}}},
        "got 'model.lrr', which none has. Did you mean 'model.lr'?",
    ),
    ({"search": {}}, "`search` must map arguments to what they may be"),
    ({"search": {"model.lr": 3}}, "`search` of 'model.lr' must be `{low: 1.0e-4"),
    ({"search": {"model.lr": {"low": 1, "high": 0}}}, "must have low < high, got low 1 and high 0"),
    ({"search": {"model.lr": {"low": 0, "high": 1, "log": True}}}, "must be > 0 on a logarithmic"),
    ({"search": {"model.lr": {"low": 0, "high": 1, "step": 2}}}, "must be in (0, 1], got 2."),
    (
        {"search": {"model.lr": {"low": 0, "high": float("nan")}}},
        "must be a finite number, got nan",
    ),
    (
        {"search": {"model.lr": {"low": 1, "high": 2, "log": True, "step": 0.5}}},
        "must have `step` or `log`, got both.",
    ),
    ({"search": {"model.lr": {"low": 1, "high": 2, "log": 1}}}, "must be true or false, got 1."),
    ({"search": {"model.lr": {"choices": []}}}, "must be a list of texts, numbers, true"),
    ({"search": {"model.lr": {"choices": [1, 1]}}}, "must differ, got 1 more than once."),
    ({"search": {"model.lr": {"choices": ["fast"]}}}, "Method 'LS' with model.lr = 'fast': "),
    ({"trials": 0}, "`trials` must be an integer >= 1, got 0."),
    ({"direction": "up"}, "`direction` must be 'minimize' or 'maximize', got 'up'."),
    ({"sampler": "TPESample"}, "got 'TPESample'. Did you mean 'TPESampler'? It has: "),
    (
        {"sampler": {"class_path": "TPESampler", "init_args": {"sed": 1}}},
        "TPESampler has no argument 'sed'. Did you mean 'seed'?",
    ),
    ({"pruner": "MedianPrune"}, "got 'MedianPrune'. Did you mean 'MedianPruner'?"),
    ({"pruner": 3}, "`pruner` must be a class name of Optuna, or a mapping"),
    ({"storage": "InMemoryStorage"}, "must be one that every trial's process can open"),
    ({"storage": "sqlite:///:memory:"}, "must be one that every trial's process can open"),
    ({"storage": "Storage"}, "`storage` must be a class of optuna.storages, got 'Storage'."),
    ({"trial": 3}, "A search has no setting 'trial'. Did you mean 'trials'?"),
    ({"compare": {"seed": [3]}}, "A comparison has no setting 'seed'. Did you mean 'seeds'?"),
    ({"compare": {"methods": {}}}, "`compare` must leave out `methods`"),
    ({"methods": {"A": ["CAGrd"]}}, "Method 'A': trainer.callbacks: There is no class 'CAGrd'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_a_wrong_setting(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    launcher: InProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_search(tmp_path, **changes)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", f"--config={path}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert all(name.startswith("rehearsal") for name in launcher.started)


def test_a_base_that_cannot_run(tmp_path: Path, launcher: InProcess) -> None:
    base = {**BASE, "data": {**BASE["data"], "init_args": {"path": "nowhere.csv"}}}
    with pytest.raises(ValueError, match=r"One batch of `config` must run before .*nowhere\.csv"):
        tune(write_search(tmp_path, base))
    assert len(launcher.started) == 1


def test_the_trials_of_another_search(tmp_path: Path, launcher: InProcess) -> None:
    tune(write_search(tmp_path, **ONE, trials=1))
    launcher.started.clear()
    other = {"model.lr": {"low": 0.02, "high": 0.1}}
    with pytest.raises(ValueError, match=r"another search: search\.model\.lr\.low was 0\.01 and"):
        tune(write_search(tmp_path, methods={"LS": []}, search=other, trials=1))
    assert launcher.started == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no search"):
        tune(write_search(tmp_path), output=tmp_path / "other")


def test_a_storage_by_its_class(tmp_path: Path) -> None:
    """Two folders, as on two machines, share a budget."""
    backend = {"class_path": "JournalFileBackend", "init_args": {"file_path": str(tmp_path / "j")}}
    storage = {"class_path": "JournalStorage", "init_args": {"log_storage": backend}}
    given = {**ONE, "storage": storage, "name": "shared"}
    tune(write_search(tmp_path, **given, trials=1), output=tmp_path / "a")
    trials = tune(write_search(tmp_path, **given, trials=2), output=tmp_path / "b")
    assert len(trials) == 2
    assert len(list((tmp_path / "b/trials").glob("LS-*-seed3-*"))) == 1


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r'run `pip install "lightning-flatmtl\[tune\]"`'):
        tune(write_search(tmp_path))


def test_the_figures(tmp_path: Path) -> None:
    rows = [
        {"method": m, "trial": i, "state": "pruned" if i == 3 else "complete", "value": v + 0.1 * i}
        | {"model.lr": 10.0 ** -(i + 1), "model.name": "ab"[i % 2]}
        for m, v in (("LS", 1.0), ("F-LS", 2.0))
        for i in range(5)
    ]
    rows.append({"method": "LS", "trial": 5, "state": "failed", "value": None})
    spaces = {
        "model.lr": Space.of("model.lr", {"low": 1e-6, "high": 1.0, "log": True}),
        "model.name": Space.of("model.name", {"choices": ["a", "b"]}),
    }
    methods = {"LS": spaces, "F-LS": spaces}
    assert write_figures(tmp_path, rows, {}, "val/loss", "minimize", methods) == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arguments.png", "trials.png"]
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in tmp_path.iterdir())
    assert write_figures(tmp_path / "none", [], {}, "val/loss", "minimize", methods) == ()


def test_it_is_public() -> None:
    assert lightning_flatmtl.tune is room is tune
