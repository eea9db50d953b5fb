"""What is wrong with a comparison is said before the first run starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison.comparison import compare
from tests.comparison.project import BASE, COMPARISON, InProcess, write

pytestmark = [
    pytest.mark.usefixtures("launcher"),
    pytest.mark.filterwarnings(
        "ignore:The dirpath has changed",
        "ignore:Checkpoint directory",
        "ignore:.*does not have many",
    ),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of what the command says, whose status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"methods": {"A": ["CAGrd"]}}, "Method 'A': trainer.callbacks: There is no class 'CAGrd'"),
    ({"methods": {"A": ["CAGrad"], "B": ["CAGrad"]}}, "Methods 'A' and 'B' are the same"),
    ({"methods": {"A": "CAGrad"}}, "Method 'A' must have a list of callbacks"),
    ({"methods": {"A": [3]}}, "A callback of method 'A' must be a class name"),
    ({"methods": {}, "single_task": False}, "`methods` must name at least one"),
    ({"methods": ["CAGrad"]}, "`methods` must map names to lists"),
    ({"methods": {"a/b": []}}, "The name of a method must be a text without"),
    ({"methods": {"single-task": []}}, "'single-task' is the row of the baselines"),
    (
        {"methods": {"A": [{"class_path": "TaskSAM", "init_args": {"rh": 1}}]}},
        "Method 'A': trainer.callbacks: TaskSAM has no argument 'rh'. Did you mean 'rho'?",
    ),
    (
        {"methods": {"A": ["CAGrad", "MGDA"]}},
        "Method 'A' must have at most one Aggregator, got CAGrad and MGDA. Keep one of them.",
    ),
    ({"seeds": [0, 1, 0]}, "`seeds` must differ, got 0 more than once."),
    ({"seeds": []}, "`seeds` must be a list of integers >= 0, got []."),
    ({"seeds": [-1]}, "`seeds` must be a list of integers >= 0, got [-1]."),
    ({"seed_keys": ["data.sed"]}, "got 'data.sed', which it does not have."),
    ({"select": "best"}, "`select` must be `last`"),
    ({"select": {"monitor": "test/loss"}}, "`select` must choose by validation data"),
    ({"select": {"monitor": "val/loss", "mode": "least"}}, "must be 'min' or 'max', got 'least'."),
    ({"select": {"mean_of_last": 0}}, "`mean_of_last` must be an integer >= 1, got 0."),
    (
        {"select": {"monitor": "val/los"}},
        "must be logged in validation, got 'val/los'. Did you mean 'val/loss'?",
    ),
    ({"metrics": ["sign/hit"]}, "got 'sign/hit'. Did you mean 'sign/hits'? They log: "),
    ({"delta_m": ["sign/hit"]}, "`delta_m` must be what the runs log, got 'sign/hit'."),
    ({"metrics": ["a", "a"]}, "`metrics` must be different names"),
    ({"metric": ["a"]}, "A comparison has no setting 'metric'. Did you mean 'metrics'?"),
    ({"tasks": None}, "`single_task` needs the names of the tasks"),
    ({"higher_is_better": {"a": "yes"}}, "must map names of metrics to true or false"),
    ({"resources": {"gpus": 1}}, "`resources` must be a mapping with `cpu` and `gpu`"),
    ({"resources": {"gpu": 1.5}}, "must be a share in [0, 1] or a whole number, got 1.5."),
    ({"resources": {"cpu": 0}}, "must be an integer >= 1, got 0."),
    ({"config": "nowhere.yaml"}, "`config` must be a file, got "),
    ({"config": None}, "`config` must be a file of `flatmtl fit`"),
    ({"single_task": "yes"}, "`single_task` must be true, false or"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_a_wrong_setting(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    launcher: InProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, **{"seeds": [3], "single_task": bool("tasks" in changes), **changes})
    said = refused(capsys, "compare", f"--config={path}")
    assert message in said
    assert all(name.startswith("rehearsal") for name in launcher.started)


def test_wrong_words_of_the_command(
    tmp_path: Path, launcher: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, seeds=[3])
    given = ["compare", f"--config={path}"]
    assert "got 'CAGrd'. Did you mean 'CAGrad'?" in refused(capsys, *given, "--only", "CAGrd")
    assert "must be at least 1, got 0" in refused(capsys, *given, "--workers=0")
    assert "invalid choice: 'slurm'" in refused(capsys, *given, "--launcher=slurm")
    assert "unrecognized arguments: --trainer.max_epoch2=3" in refused(
        capsys, *given, "--trainer.max_epoch2=3"
    )
    assert "unrecognized argument: 2" in refused(capsys, *given, "--trainer.max_epochs", "2")
    assert "no file of a comparison at 'no.yaml'" in refused(capsys, "compare", "--config=no.yaml")
    assert "arguments are required: --config" in refused(capsys, "compare")
    base = str(tmp_path / "base.yaml")
    assert "is the configuration of a single run" in refused(capsys, "compare", f"--config={base}")
    assert launcher.started == []


def test_a_method_in_the_base(tmp_path: Path) -> None:
    base = {**BASE, "trainer": {**BASE["trainer"], "callbacks": [{"class_path": "CAGrad"}]}}
    with pytest.raises(ValueError, match="must be a base without a method, got one with CAGrad"):
        compare(write(tmp_path, base))


def test_the_folder_of_another_comparison(tmp_path: Path, launcher: InProcess) -> None:
    path = write(tmp_path, methods={"LS": []}, seeds=[3], single_task=False)
    compare(path)
    launcher.started.clear()
    with pytest.raises(ValueError, match=r"holds another comparison: base.trainer.max_epochs was"):
        compare(path, "--trainer.max_epochs=1")
    with pytest.raises(ValueError, match="holds another comparison: select was"):
        compare(write(tmp_path, methods={"LS": []}, select="last"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        compare(path, output=tmp_path / "full")
    assert launcher.started == []


def test_twice_the_same_key(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("methods:", "methods: {A: [MGDA], A: []}\nx:"))
    with pytest.raises(ValueError, match="'A' is given twice in the same mapping"):
        compare(path)


def test_from_python_a_mapping_does_too(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match="`workers` must be an integer >= 1, got 0"):
        compare({**COMPARISON, "config": str(base), "output": str(tmp_path / "out")}, workers=0)
