"""Runs as tasks of a Ray cluster, which queues them and places them on its nodes."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers import on_node
from lightning_flatmtl.comparison.launchers.base import Launcher, Process, command
from lightning_flatmtl.comparison.settings import Resources

__all__ = ["RayLauncher"]

_NODES_LOST = 5
"""How often a run is begun on another node; one that kills its nodes is not to kill them all."""

_LOOK_EVERY = 1.0
"""Seconds between two looks at what Ray and the folder say."""

_LATE = 90.0
"""Seconds that a shared file system may take to show here what a node has written."""


class RayProcess(Process):
    """A task of Ray: it waits for its turn, runs, and may wait again when its node has died.

    Args:
        ray: The module.
        task: The reference of the task.
        folder: The folder of the run.
        submission: What the note in the folder says if a node has begun this task.
        alive: The nodes that are alive.
    """

    def __init__(
        self,
        ray: Any,
        task: Any,
        folder: RunFolder,
        submission: str,
        alive: Callable[[], set[str]],
    ) -> None:
        self._ray, self._task, self._folder = ray, task, folder
        self._submission, self._alive = submission, alive
        self._begun, self._looked = False, 0.0
        self._status: int | None = None
        self._ended: float | None = None

    @property
    @override
    def begun(self) -> bool:
        """Whether a node that is alive has begun it."""
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            self._begun = self._node() in self._alive()
        return self._begun

    @override
    def status(self) -> int | None:
        if self._status is None:
            status = self._result()
            if status == 0 and self._folder.result is None:
                status = self._wait_for_result()
            self._status = status
        return self._status

    @override
    def cancel(self) -> None:
        if self._status is None:
            self._ray.cancel(self._task)

    @override
    def stop(self) -> None:
        self.cancel()
        if self._status is None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(self._task)
            self._status = -signal.SIGTERM

    def _result(self) -> int | None:
        """What the task has returned; ``None`` before it has."""
        ready, _ = self._ray.wait([self._task], timeout=0)
        if not ready:
            return None
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(self._task))
        except errors.TaskCancelledError:  # by other means than ours
            self._note_error("The task was cancelled in Ray.")
        except errors.RayTaskError as error:  # what `train` has raised: it never began
            self._note_error(str(error.cause))
        except errors.RayError as error:
            self._note_error(f"Ray gave it up: {str(error).strip().splitlines()[0]}")
        return 1

    def _wait_for_result(self) -> int | None:
        """Wait for a slow file system; ``None`` in the meantime."""
        now = time.monotonic()
        self._ended = now if self._ended is None else self._ended
        if now - self._ended < _LATE:
            return None
        self._note_error(
            "It has ended well on its node, and its result is not in the folder here. The `output` "
            "of a comparison must lie in a file system that all nodes share."
        )
        return 1

    def _note_error(self, words: str) -> None:
        """Write it where the reason of a failure is looked for."""
        with contextlib.suppress(OSError), self._folder.log.open("a", encoding="utf-8") as log:
            log.write(f"error: {' '.join(words.split())}\n")

    def _node(self) -> str | None:
        try:
            note = json.loads((self._folder.path / on_node.NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note["node"] if note["submission"] == self._submission else None


class RayLauncher(Launcher):
    """Hands all runs to a Ray cluster; when and where each of them runs is Ray's business.

    The cluster is the one of ``RAY_ADDRESS``, or the one that this machine is a node of;
    ``RAY_ADDRESS=local`` starts one here for the time of the comparison. The output of the
    comparison and the folder it is started in must lie in a file system that all nodes share, under
    the same path; the package, of the same version, is installed on all of them.

    A run whose node dies is begun again on another one, where it goes on from its last epoch. A run
    that fails by itself has failed.

    Args:
        resources: What Ray reserves for each run: 1 CPU by default, which is its number of threads
            too, and no GPU.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
        ConnectionError: If there is no cluster.
        ValueError: If the cluster has GPUs and it is not said how many a run takes.
    """

    def __init__(self, resources: Resources) -> None:
        self._ray = _import_ray()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray)
        self._seen, self._looked = set[str](), 0.0
        try:
            _check_resources(self._ray, resources)
        except ValueError:
            self.close()
            raise
        self._threads = resources.cpu or 1
        self._variables = _variables(self._threads, resources.gpu)
        # Sent by value: a node needs to import nothing of ours, which would cost it torch.
        self._ray.cloudpickle.register_pickle_by_value(on_node)
        self._train = self._ray.remote(
            num_cpus=self._threads,
            num_gpus=resources.gpu or 0,
            max_retries=_NODES_LOST,
            retry_exceptions=False,
        )(on_node.train)

    @override
    def has_room(self, running: int) -> bool:
        return True

    @override
    def start(self, folder: RunFolder) -> Process:
        submission = uuid.uuid4().hex
        task = self._train.options(name=f"flatmtl {folder.path.name}").remote(
            folder=str(folder.path),
            arguments=command(folder)[1:],
            directory=os.getcwd(),
            paths=_own_paths(),
            variables=self._variables,
            submission=submission,
        )
        return RayProcess(self._ray, task, folder, submission, self._alive)

    @override
    def close(self) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def _alive(self) -> set[str]:
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            self._seen = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return self._seen


def _import_ray() -> Any:
    try:
        import ray  # noqa: PLC0415 # optional
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            'Ray is not installed: run `pip install "lightning-flatmtl[ray]"`, or leave out '
            "`--launcher ray`.",
            name="ray",
        ) from None
    return ray


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto" and not _answers(address):
        raise ConnectionError(
            f"`RAY_ADDRESS` must be the address of a Ray cluster, got '{address}', where nothing "
            "answers. Start it by `ray start --head`, or unset RAY_ADDRESS."
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise ConnectionError(
            "`--launcher ray` must find a Ray cluster, got none: this machine is no node of one, "
            "and RAY_ADDRESS is not set. Start one by `ray start --head` here and `ray start "
            "--address=HEAD:6379` on each further node, set RAY_ADDRESS to the address of one, or "
            "to `local` for one on this machine alone."
        ) from None


def _answers(address: str) -> bool:
    """Whether something listens there. Ray would wait for minutes, and end this process then."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return True  # `local`, or another word that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _check_resources(ray: Any, resources: Resources) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if resources.gpu is None and any(node.get("GPU") for node in nodes):
        raise ValueError(
            "`resources` must say how many GPUs a run takes on a Ray cluster that has some, got no "
            "`gpu`. Add `resources: {gpu: 1}` to the file of the comparison, a share such as 0.5, "
            "or 0 to train on CPUs."
        )
    asked = {"CPU": resources.cpu or 1, "GPU": resources.gpu or 0}
    if not any(all(node.get(kind, 0) >= n for kind, n in asked.items()) for node in nodes):
        said = ", ".join(f"{n:g} {kind}" for kind, n in asked.items())
        sys.stderr.write(  # an autoscaler may start one
            f"No node of the Ray cluster has {said} now. The runs wait until there is one; ask "
            "for less by `resources` if there will be none.\n"
        )


def _variables(threads: int, gpu: float | None) -> dict[str, str]:
    found = {"PYTHONUNBUFFERED": "1"}
    found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    if not gpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def _own_paths() -> list[str]:
    """Where this process finds modules that are not installed; a node has its own of the others."""
    places = sysconfig.get_paths()
    installed = tuple(places[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    paths = [os.path.abspath(path) for path in sys.path]
    own = [path for path in paths if not path.startswith(installed) and not path.endswith(".zip")]
    return list(dict.fromkeys(own))
