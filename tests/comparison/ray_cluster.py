"""A Ray cluster of several nodes on this machine, of which nothing is left in the end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        # The paths of sockets must be short.
        self.head = self._start("--head", f"--port={port}", f"--temp-dir={folder / 'ray'}")
        until(lambda: answers(port), 200)

    def add_node(self) -> int:
        return self._start(f"--address={self.address}")

    def _start(self, *arguments: str) -> int:
        """Start a node with one CPU; returns its process group."""
        ray = Path(sys.executable).with_name("ray")
        common = ("--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000", "--block")
        quiet = ("--disable-usage-stats",)
        if "--head" in arguments:
            quiet += ("--include-dashboard=false",)
        with (self.folder / f"node{len(self._nodes)}.txt").open("wb") as output:
            node = subprocess.Popen(
                [str(ray), "start", *arguments, *common, *quiet],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ray's tasks give way to all else, which makes them wait for other tests.
                env={**os.environ, "RAY_worker_niceness": "0"},
                start_new_session=True,
            )
        self._nodes.append(node)
        return node.pid

    def close(self) -> None:
        for node in self._nodes:
            end(members(node.pid))
            node.wait()


@contextmanager
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    begun = Cluster.__new__(Cluster)
    begun._nodes = []
    try:
        begun.__init__(folder)  # type: ignore[misc]
        yield begun
    finally:
        begun.close()
        shutil.rmtree(folder)


def processes() -> dict[int, tuple[int, int]]:
    """The parent and the group of each process."""
    said = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,pgid="], check=True, capture_output=True, text=True
    ).stdout
    rows = [tuple(map(int, line.split())) for line in said.splitlines()]
    return {pid: (parent, group) for pid, parent, group in rows}


def members(group: int) -> list[int]:
    """The processes of a group and all that come from them."""
    known = processes()
    found = {pid for pid, (_, of) in known.items() if of == group}
    while more := {pid for pid, (parent, _) in known.items() if parent in found} - found:
        found |= more
    return sorted(found)


def end(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    until(lambda: not any(alive(pid) for pid in pids), 30)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)
