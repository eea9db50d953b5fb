"""The runs of a comparison and what their results belong to."""

import copy
from pathlib import Path

import pytest
import yaml

from lightning_flatmtl.comparison import plan as plans
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.plan import make_plan
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.comparison.tuning.plan import make_search
from lightning_flatmtl.comparison.tuning.settings import TuneSettings
from tests.comparison.project import BASE, write

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "multidigits").rglob("*.yaml"))
METHODS = [path for path in EXAMPLES if "\nmethods:\n" in path.read_text("utf-8")]
SEARCHES = [path for path in METHODS if "\nsearch:\n" in path.read_text("utf-8")]
COMPARISONS = [path for path in METHODS if path not in SEARCHES]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def test_there_are_comparisons() -> None:
    assert {"compare", "compare_full", "flatness"} <= {path.stem for path in COMPARISONS}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_comparisons_of_the_examples(path: Path) -> None:
    settings = Settings.load(path)
    plan = make_plan(settings)
    singles = 2 if settings.single_task else 0
    assert len(plan.runs) == len(settings.seeds) * (len(settings.methods) + singles)
    assert plan.tasks == ("left", "right")
    assert len({run.hash for run in plan.runs}) == len({run.slug for run in plan.runs})
    assert len({run.hash for run in plan.runs}) == len(plan.runs)
    for run in plan.runs:
        assert run.config["seed_everything"] == run.seed
        assert run.config["data"]["init_args"]["seed"] == run.seed
        tasks = [task["init_args"]["name"] for task in run.config["model"]["init_args"]["tasks"]]
        assert tasks == ([run.task] if run.task else ["left", "right"])


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_the_searches_of_the_examples(path: Path) -> None:
    settings = TuneSettings.load(path)
    _, methods = make_search(settings)
    assert {name for each in methods for name in each.spaces} == set(settings.search)


def test_a_method_with_arguments_of_its_own(tmp_path: Path) -> None:
    methods = {
        "LS": [],
        "LS fast": {"arguments": {"model.lr": 0.5}},
        "CAGrad": {"callbacks": ["CAGrad"], "arguments": {"trainer.max_epochs": 7}},
    }
    given = {"methods": methods, "arguments": {"model.lr": 0.25, "model.width": 4}}
    path = write(tmp_path, seeds=[3], single_task=False, **given)
    runs = {r.method: r.config for r in make_plan(Settings.load(path, ["--model.width=2"])).runs}
    models = {name: config["model"]["init_args"] for name, config in runs.items()}
    assert {name: model["lr"] for name, model in models.items()} == {
        "LS": 0.25, "LS fast": 0.5, "CAGrad": 0.25
    }  # fmt: skip
    assert {model["width"] for model in models.values()} == {2}
    assert [config["trainer"]["max_epochs"] for config in runs.values()] == [3, 3, 7]
    for wrong in ({"arguments": [3]}, {"methods": {"A": {"arguments": 3}}}):
        with pytest.raises(ValueError, match="must map arguments of `flatmtl fit` to values"):
            Settings.load(write(tmp_path, **wrong))


def test_a_hash_is_of_all_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashes(*arguments: str, **changes: object) -> dict[str, str]:
        path = write(tmp_path, **{"seeds": [3], **changes})
        return {run.name: run.hash for run in make_plan(Settings.load(path, arguments)).runs}

    first = hashes()
    assert hashes() == first
    assert hashes(output=str(tmp_path / "elsewhere"), metrics=["x"]) == first
    for other in (hashes("--trainer.max_epochs=9"), hashes(select="last"), hashes("--model.lr=1")):
        assert not set(other.values()) & set(first.values())
    monkeypatch.setattr(plans, "__version__", "9.9")
    assert not set(hashes().values()) & set(first.values())


def test_what_a_run_writes_lies_in_its_folder(tmp_path: Path) -> None:
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "elsewhere"}}
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}]
    base = copy.deepcopy(BASE)
    base["trainer"] |= {"callbacks": [checkpoint], "logger": loggers}
    settings = Settings.load(write(tmp_path, base, seeds=[3], single_task=False))
    (run, *_) = make_plan(settings).runs
    folder = RunFolder(tmp_path / "run")
    folder.prepare(run)
    trainer = yaml.safe_load(folder.config.read_text())["trainer"]
    given, selected, resume, record = trainer["callbacks"]
    assert given["init_args"]["dirpath"] == str(tmp_path / "run/checkpoints/0")
    assert selected["init_args"]["monitor"] == "val/loss"
    assert selected["init_args"]["dirpath"] == str(tmp_path / "run/checkpoints/1")
    assert [entry["class_path"].rpartition(".")[2] for entry in (resume, record)] == [
        "ResumePoint",
        "RunRecord",
    ]
    assert trainer["logger"][0]["init_args"]["save_dir"] == str(tmp_path / "run")
    assert trainer["default_root_dir"] == str(tmp_path / "run")


def test_a_checkpoint_of_the_base_serves(tmp_path: Path) -> None:
    kept = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "mode": "min"}}
    select = Selection.of({"monitor": "val/loss"})
    assert select.checkpoint([kept]) is None
    kept["init_args"]["mode"] = "max"
    assert select.checkpoint([kept]) is not None
    assert Selection.of("last").checkpoint([]) is None


@pytest.mark.parametrize(
    ("single", "expected"),
    [(True, "val/size/loss"), ({"monitor": "val_{task}"}, "val_size")],
)
def test_what_chooses_the_epochs_of_a_single_task(
    tmp_path: Path, single: object, expected: str
) -> None:
    plan = make_plan(Settings.load(write(tmp_path, single_task=single)))
    first = next(run for run in plan.runs if run.task == "size")
    assert first.select.monitor == expected
    entry = first.config["trainer"]["callbacks"][0]
    assert entry["init_args"]["weights"] == {"size": 1.0, "sign": 0.0}
