"""What a comparison asks of a launcher."""

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping

from lightning_flatmtl.comparison.folder import RunFolder

__all__ = ["Launcher", "Process", "command", "environment", "line"]


class Process(ABC):
    """A run that was started."""

    @abstractmethod
    def status(self) -> int | None:
        """What it ended with: 0 if all is well, below zero for a signal; ``None`` while it runs."""

    @property
    def begun(self) -> bool:
        """Whether it runs, and does not wait for its turn where it was submitted."""
        return True

    def cancel(self) -> None:
        """Ask it to end, without waiting; :meth:`stop` comes after."""
        return

    @abstractmethod
    def stop(self) -> None:
        """End it, and wait until it is gone."""


class Launcher(ABC):
    """Starts runs."""

    @abstractmethod
    def has_room(self, running: int) -> bool:
        """Whether another run may be started beside so many."""

    @abstractmethod
    def start(self, folder: RunFolder) -> Process:
        """Start ``flatmtl fit`` with the configuration of a folder; the output goes to its log."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""


def command(folder: RunFolder) -> list[str]:
    """The command of a run; ``-P``: its modules are where this process has them."""
    return [sys.executable, "-P", "-m", "lightning_flatmtl", "fit", "--config", str(folder.config)]


def line(folder: RunFolder) -> str:
    """The same for a shell."""
    return f"flatmtl fit --config {shlex.quote(str(folder.config))}"


def environment(threads: int | None) -> Mapping[str, str]:
    """What a run finds in its environment.

    Its modules are found where this process finds them, and it takes no more threads than it may.
    """
    paths = [path or os.getcwd() for path in sys.path]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    found["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return found


def open_log(folder: RunFolder) -> int:
    """A descriptor of the log, begun anew; what an earlier try printed is kept beside it."""
    if folder.log.exists():
        folder.log.replace(folder.log.with_name("log.before.txt"))
    return os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
