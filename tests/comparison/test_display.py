"""What a terminal shows while runs and trials are on their way."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_flatmtl.comparison import display as of_runs
from lightning_flatmtl.comparison.jobs import State
from lightning_flatmtl.comparison.live import LiveDrawing
from lightning_flatmtl.comparison.tuning import display as of_trials

pytest.importorskip("rich")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for display in (of_runs, of_trials):
        monkeypatch.setattr(display, "is_live", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")


def job(method: str, state: State, **more: Any) -> Any:
    run = SimpleNamespace(method=method, task=None, seed=3, name=f"{method} seed 3")
    settled = {"error": None, "process": None, "progress": {}, "elapsed": None, "seconds": None}
    return SimpleNamespace(run=run, state=state, **{**settled, **more})


AT_WORK = {"epoch": 2, "epochs": 5, "monitor": "val/loss", "value": 0.125}


def test_runs_in_a_live_table(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        job("CAGrad", State.RUNNING, progress=AT_WORK, elapsed=75.0, process=object()),
        job("F-CAGrad", State.FAILED, error="MisconfigurationException: no [data]"),
        job("MGDA", State.QUEUED),
    ]
    with of_runs.make_display(2) as shown:
        assert isinstance(shown, of_runs.LiveTable)
        shown.show(jobs)
    out = capsys.readouterr().out
    for said in ("CAGrad", "2/5", "val/loss 0.125", "1 min 15 s", "no [data]", "queued"):
        assert said in out, said


def test_trials_in_a_live_table(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    trial = SimpleNamespace(
        method="CAGrad",
        number=7,
        name="CAGrad, trial 7",
        seconds=12.0,
        values={"model.tasks[0].lr": 0.5},
        said="pruned",
        job=SimpleNamespace(progress=AT_WORK),
    )
    with of_trials.make_display(lambda: {"CAGrad": 2}, 1) as shown:
        assert isinstance(shown, of_trials.LiveTrials)
        shown.begun(trial)  # type: ignore[arg-type]
        shown.show([trial])  # type: ignore[list-item]
        shown.ended(trial)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    for said in ("2/5", "val/loss 0.125", "tasks[0].lr 0.5", "CAGrad, trial 7", "2 left"):
        assert said in out, said


def test_nothing_is_drawn_twice_within_half_a_second(terminal: None) -> None:
    drawn: list[int] = []

    def make(number: int) -> Any:
        return lambda: drawn.append(number) or str(number)

    with LiveDrawing() as drawing:
        drawing.draw(make(1), hurry=False)
        drawing.draw(make(2), hurry=False)
        drawing.draw(make(3), hurry=True)
    assert drawn == [1, 3]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    running = job("CAGrad", State.RUNNING, process=object())
    with of_runs.make_display(1) as shown:
        assert isinstance(shown, of_runs.Lines)
        shown.show([running])
        shown.show([running])
    assert capsys.readouterr().out == "CAGrad seed 3: running  (1 running)\n"
