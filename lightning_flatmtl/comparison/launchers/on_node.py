"""What a node of a Ray cluster does for a run. It is sent there, and needs Python alone."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["NOTE", "train"]

NOTE = "node.json"
"""In the folder of a run: which node has begun it."""

_TICK = 0.2
_PATIENCE = 10.0
"""Seconds that a run has to end by itself."""


def train(
    folder: str,
    arguments: Sequence[str],
    directory: str,
    paths: Sequence[str],
    variables: Mapping[str, str],
    submission: str,
) -> int:
    """Train in a process of its own, whose output goes to the log; returns its exit status.

    Args:
        folder: The folder of the run.
        arguments: What follows ``python``.
        directory: Where relative paths of the configuration begin.
        paths: Where Python finds modules before it looks among the installed ones.
        variables: Further environment variables.
        submission: What the note says, for the comparison to recognise it.

    Raises:
        FileNotFoundError: If the node does not see the folders of the comparison.
    """
    for needed in (Path(folder, "run.yaml"), Path(directory)):
        _must_be_seen(needed)
    _leave_note(Path(folder), submission)
    log = Path(folder, "log.txt")
    if log.exists():
        log.replace(log.with_name("log.before.txt"))
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    found = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([*paths, *before])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # If this worker of Ray is killed, its training ends, which would hold the run's lock.
            env={**found, "FLATMTL_PARENT": str(os.getpid())},
            start_new_session=True,
        )
    try:
        while process.poll() is None:  # Ray interrupts a sleep, and would not interrupt a wait
            time.sleep(_TICK)
    finally:
        _end(process)
    return process.returncode


def _must_be_seen(path: Path) -> None:
    if path.exists():
        return
    raise FileNotFoundError(
        f"Node '{platform.node()}' of the Ray cluster does not see '{path}'. The `output` of "
        "the comparison and the folder it is started in must lie in a file system that all nodes "
        "share, under the same path."
    )


def _leave_note(folder: Path, submission: str) -> None:
    import ray  # noqa: PLC0415 # it is here if we are

    node = ray.get_runtime_context().get_node_id()
    note = {"submission": submission, "node": node, "host": platform.node()}
    part = folder / f".{NOTE}.{os.getpid()}"
    part.write_text(json.dumps(note), encoding="utf-8")
    part.replace(folder / NOTE)


def _end(process: "subprocess.Popen[bytes]") -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, sign)
            process.wait(_PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
