"""Why a run has failed: one line out of what it printed."""

import re
import signal
from pathlib import Path

__all__ = ["reason"]

_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*): (?P<words>.+)$")
_KINDS = re.compile(r"(Error|Exception|Interrupt|Exit|Warning|Failure|NotFound)$")
_TAIL = 200_000


def reason(log: Path, status: int) -> str:
    """The error of a process that has ended with ``status`` and printed ``log``.

    Args:
        log: Its output.
        status: What it returned; below zero, the signal that ended it.
    """
    lines = _tail(log)
    for line in reversed(lines):
        if line.startswith("error: "):  # what the command itself says of its settings
            return line.removeprefix("error: ")
        raised = _RAISED.match(line)
        if raised and _KINDS.search(raised["kind"]):
            return f"{raised['kind'].rpartition('.')[2]}: {raised['words']}"
    if status < 0:
        name = signal.Signals(-status).name
        memory = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}"
    bare = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"ended with status {status}: {bare.strip()}"


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
