"""Comparisons that are killed, interrupted, or two at once; with processes, as users have them."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_flatmtl
from tests.comparison.project import write

ROOT = Path(lightning_flatmtl.__file__).parents[1]
SLOW = {"class_path": "tests.comparison.project.Slow", "init_args": {"seconds": 0.1}}
METHODS = {"LS": [SLOW], "CAGrad": ["CAGrad", SLOW]}
TIMED = {"seconds_per_step", "peak_memory_mib"}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `flatmtl compare` in a process group of its own, which is gone in the end."""
    begun: list[subprocess.Popen[str]] = []
    # A process that is begun in the background by a shell ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(path: Path, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_flatmtl", "compare", f"--config={path}", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def runs_of(path: Path) -> list[int]:
    """The processes of runs below a folder."""
    found = subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_broken_off_and_begun_again(sign: signal.Signals, start: Start, tmp_path: Path) -> None:
    """In the second run's second epoch: no finished run is repeated, the table is the same."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    paths = []
    for folder in (unbroken, broken):
        folder.mkdir()
        paths.append(write(folder, methods=METHODS, seeds=[3], single_task=False))
    out, _ = (process := start(paths[0])).communicate()
    assert process.returncode == 0, out
    process = start(paths[1])
    runs = broken / "out/runs"
    wait_for(lambda: list(runs.glob("CAGrad-*/checkpoints/resume.ckpt")), process)
    (done,) = runs.glob("LS-*/result.json")
    before = done.stat().st_mtime_ns
    os.kill(process.pid, sign)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == (-sign if sign == signal.SIGKILL else 130), out
    if sign != signal.SIGKILL:
        assert "the same command goes on" in out
        assert [row["status"] for row in table(broken / "out")] == ["done", "queued"]
    end = time.monotonic() + 20
    while runs_of(runs) and time.monotonic() < end:  # a run ends with its comparison
        time.sleep(0.1)
    assert runs_of(runs) == []
    assert not list(runs.glob("CAGrad-*/result.json"))
    out, _ = (process := start(paths[1])).communicate()
    assert process.returncode == 0, out
    assert done.stat().st_mtime_ns == before
    (log,) = runs.glob("CAGrad-*/log.txt")
    assert "Restored all states from the checkpoint" in log.read_text()
    assert table(broken / "out") == table(unbroken / "out")


@pytest.mark.slow
def test_two_at_once(start: Start, tmp_path: Path) -> None:
    """They share the work, no run is done twice, and both write the whole table."""
    path = write(tmp_path, methods=METHODS, seeds=[3, 4], single_task=False, select="last")
    both = [start(path), start(path)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [row["status"] for row in table(tmp_path / "out")] == ["done"] * 4
    trained = [
        log
        for log in (tmp_path / "out/runs").glob("*/log*.txt")
        if "max_epochs=3` reached" in log.read_text()
    ]
    assert len(trained) == 4


@pytest.mark.slow
def test_a_run_that_is_killed(start: Start, tmp_path: Path) -> None:
    path = write(tmp_path, methods=METHODS, seeds=[3], single_task=False, select="last")
    process = start(path)
    runs = tmp_path / "out/runs"
    wait_for(lambda: list(runs.glob("LS-*/progress.json")), process)
    for run in runs_of(runs / "LS-"):
        os.kill(run, signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows[0]["error"] == "ended by SIGKILL (often: out of memory)"
    out, _ = (process := start(path)).communicate()  # what has failed is begun again
    assert process.returncode == 0, out
    assert [row["status"] for row in table(tmp_path / "out")] == ["done", "done"]


@pytest.mark.slow
def test_a_full_disk(start: Start, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the checkpoints of one method do not fit."""
    full = {"class_path": "tests.comparison.project.FullDisk", "init_args": {"kib": 16}}
    methods = {"LS": [], "full": [full], "CAGrad": ["CAGrad"]}
    path = write(tmp_path, methods=methods, seeds=[3], single_task=False, select="last")
    out, _ = (process := start(path)).communicate()
    assert process.returncode == 1, out
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "File too large" in rows[1]["error"]
    assert "full, seed 3: " in (tmp_path / "out/table.md").read_text()
