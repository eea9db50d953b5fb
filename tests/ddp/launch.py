"""Starts real processes that train together, and never leaves one behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of one process."""

    saved: Any
    """What the job returned there; ``None`` if it did not come so far."""
    code: int | None
    """Exit status, ``-signal`` for a signal; ``None`` if its time was up."""
    output: str
    """What it has printed, errors included."""
    seconds: float
    """How long all processes took."""


def launch(job: str, size: int, folder: Path, timeout: float, retry: bool = True) -> list[Outcome]:
    """Run a job in ``size`` processes and return what became of each.

    gloo now and then aborts a process for reasons of its own. Then the processes are started once
    more; what they find out is judged by the caller and never tried again.

    Args:
        job: ``"package.module:function"``; the function gets a ``Place``.
        size: The number of processes.
        folder: For files that all processes see.
        timeout: Seconds after which all are killed.
        retry: Whether every process is expected to save something.
    """
    outcomes = _once(job, size, folder, timeout)
    if retry and any(o.saved is None and o.code == -signal.SIGABRT for o in outcomes):
        outcomes = _once(job, size, folder, timeout)
    return outcomes


def results(job: str, size: int, folder: Path, timeout: float) -> list[Any]:
    """What the job returned in each process, all of which must have come to their end."""
    outcomes = launch(job, size, folder, timeout)
    for rank, outcome in enumerate(outcomes):
        assert outcome.saved is not None, f"process {rank}: {outcome.code}\n{outcome.output}"
    return [outcome.saved for outcome in outcomes]


def _once(job: str, size: int, folder: Path, timeout: float) -> list[Outcome]:
    stem = f"{job.replace(':', '.')}_{size}"
    saved = [folder / f"{stem}_{rank}.pt" for rank in range(size)]
    logs = [path.with_suffix(".log") for path in saved]
    for path in saved:
        path.unlink(missing_ok=True)
    port = free_port()
    begin = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            with logs[rank].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ddp.worker", job, str(saved[rank])],
                        cwd=ROOT,
                        env={**os.environ, **_variables(rank, size, port)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        codes = [_wait(process, begin + timeout) for process in processes]
        seconds = time.monotonic() - begin
    finally:
        for process in processes:
            _kill(process)
    return [
        Outcome(
            torch.load(path, weights_only=False) if path.exists() else None,
            code,
            log.read_text(errors="replace"),
            seconds,
        )
        for path, code, log in zip(saved, codes, logs, strict=True)
    ]


def free_port() -> int:
    """A port that nobody uses and that is not given to anybody else soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _variables(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started; each has a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
