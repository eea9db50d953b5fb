"""Processes of this machine: what they may see and take, and why they have ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_flatmtl.comparison.launchers.base import environment
from lightning_flatmtl.comparison.launchers.local import GPUs
from lightning_flatmtl.comparison.parent import PARENT
from lightning_flatmtl.comparison.reasons import reason

DEVICES = ["0", "1"]


def test_whole_gpus() -> None:
    gpus = GPUs(1.0, DEVICES)
    first, second = gpus.take(), gpus.take()
    assert sorted(first + second) == DEVICES
    assert not gpus.free
    assert gpus.environment(first) == {"CUDA_VISIBLE_DEVICES": first[0]}
    gpus.release(first)
    assert gpus.free
    assert gpus.take() == first


def test_shares_of_gpus_are_spread() -> None:
    gpus = GPUs(1 / 3, DEVICES)
    held = []
    while gpus.free:
        held.append(gpus.take())
    assert len(held) == 6
    assert {tuple(each) for each in held[:2]} == {("0",), ("1",)}


def test_two_gpus_a_run() -> None:
    gpus = GPUs(2.0, [*DEVICES, "2"])
    held = gpus.take()
    assert len(held) == 2
    assert not gpus.free
    assert gpus.environment(held)["CUDA_VISIBLE_DEVICES"].count(",") == 1


def test_all_or_none() -> None:
    assert GPUs(None, DEVICES).environment([]) == {}
    none = GPUs(0.0, DEVICES)
    assert none.free
    assert none.environment(none.take()) == {"CUDA_VISIBLE_DEVICES": ""}


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="ask for 2 GPU a run, and 1 can be seen here"):
        GPUs(2.0, ["0"])


def test_the_environment_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = environment(3)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"
    assert str(tmp_path) in found["PYTHONPATH"].split(os.pathsep)


def test_a_run_ends_with_its_parent(tmp_path: Path) -> None:
    """A child that watches a parent which has ended by then."""
    watching = (
        "import sys, time; sys.path[:0] = [sys.argv[1]];"
        "from lightning_flatmtl.comparison.parent import end_with_parent;"
        "end_with_parent(); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    parent = (
        "import os, subprocess, sys;"
        f"os.environ['{PARENT}'] = str(os.getpid()); os.environ.pop('LOCAL_RANK', None);"
        f"child = subprocess.Popen([sys.executable, '-c', {watching!r}, {str(root)!r}]);"
        "print(child.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    child = int(done.stdout)
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{child}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it lives on")


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("Traceback ...\n  x\nValueError: a fault\n", 1, "ValueError: a fault"),
        ("a.b.OutOfMemoryError: CUDA out of memory\n", 1, "OutOfMemoryError: CUDA out of memory"),
        ("help\nerror: model: no such thing\n", 2, "model: no such thing"),
        ("working\n", -9, "ended by SIGKILL (often: out of memory)"),
        ("working\n", -15, "ended by SIGTERM"),
        ("working\n\n", 3, "ended with status 3: working"),
        ("", 3, "ended with status 3: it printed nothing"),
        ("INFO: all is well\nKeyError: 'x'\nat the end\n", 1, "KeyError: 'x'"),
    ],
)
def test_why_a_run_has_failed(said: str, status: int, expected: str, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(said)
    assert reason(log, status) == expected


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert reason(tmp_path / "log.txt", 1) == "ended with status 1: it printed nothing"
