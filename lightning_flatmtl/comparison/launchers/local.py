"""Runs as processes of this machine, several side by side."""

import os
import signal
import subprocess
import time

import torch
from typing_extensions import override

from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import (
    Launcher,
    Process,
    command,
    cores,
    environment,
    open_log,
)
from lightning_flatmtl.comparison.parent import PARENT
from lightning_flatmtl.comparison.settings import Resources

__all__ = ["LocalLauncher"]

_PATIENCE = 10.0
"""Seconds that a run has to end by itself."""


class LocalProcess(Process):
    """A process group of its own, so that Ctrl-C reaches the comparison alone, which ends it."""

    def __init__(self, process: "subprocess.Popen[bytes]", gpus: "GPUs", held: list[str]) -> None:
        self._process, self._gpus, self._held = process, gpus, held
        self._asked = 0.0

    @override
    def status(self) -> int | None:
        status = self._process.poll()
        if status is not None:
            self._gpus.release(self._held)
            self._held = []
        return status

    @override
    def cancel(self) -> None:
        self._asked = self._asked or time.monotonic()
        self._signal(signal.SIGTERM)

    @override
    def stop(self) -> None:
        if not self._asked:
            self.cancel()
        self._wait(self._asked + _PATIENCE)
        self._signal(signal.SIGKILL)
        self._wait(time.monotonic() + _PATIENCE)
        self.status()

    def _signal(self, sign: signal.Signals) -> None:
        if self._process.poll() is not None:
            return
        try:
            os.killpg(self._process.pid, sign)
        except ProcessLookupError:
            return

    def _wait(self, end: float) -> None:
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)


class LocalLauncher(Launcher):
    """Up to so many processes at a time.

    Args:
        workers: How many.
        resources: Threads of each, by default an equal share of the cores; a share of GPUs, by
            default every run sees all.
    """

    def __init__(self, workers: int, resources: Resources) -> None:
        self._workers = workers
        self._threads = resources.cpu or max(1, cores() // workers)
        self._gpus = GPUs(resources.gpu)

    @override
    def has_room(self, running: int) -> bool:
        return running < self._workers and self._gpus.free

    @override
    def start(self, folder: RunFolder) -> Process:
        held = self._gpus.take()
        found = {**environment(self._threads), **self._gpus.environment(held)}
        log = open_log(folder)
        try:
            process = subprocess.Popen(
                command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**found, PARENT: str(os.getpid())},
                start_new_session=True,
            )
        finally:
            os.close(log)
        return LocalProcess(process, self._gpus, held)

    @override
    def close(self) -> None:
        return


class GPUs:
    """Which GPUs a run may see: whole ones, or a share of one.

    Args:
        share: What each run takes; ``None`` to let it see all.
        devices: Their names; by default those that are visible.
    """

    def __init__(self, share: float | None, devices: list[str] | None = None) -> None:
        self._share = share
        if devices is None:
            devices = visible() if share else []
        self._left = dict.fromkeys(devices, 1.0)
        needed = max(1, int(share or 0))
        if share and len(devices) < needed:
            raise ValueError(
                f"`resources` ask for {share:g} GPU a run, and {len(devices)} can be seen here. "
                "Ask for less, or run the comparison where they are."
            )

    @property
    def free(self) -> bool:
        """Whether a further run can have its share."""
        return not self._share or len(self._fitting()) >= max(1, int(self._share))

    def take(self) -> list[str]:
        """Take the share of a run; those that have most left come first."""
        if not self._share:
            return []
        held = self._fitting()[: max(1, int(self._share))]
        for device in held:
            self._left[device] -= min(self._share, 1.0)
        return held

    def release(self, held: list[str]) -> None:
        """Give it back."""
        for device in held:
            self._left[device] += min(self._share or 0.0, 1.0)

    def environment(self, held: list[str]) -> dict[str, str]:
        """What makes a run see them alone."""
        if self._share is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(held)}

    def _fitting(self) -> list[str]:
        share = min(self._share or 0.0, 1.0) - 1e-9  # thirds add up
        fitting = [device for device, left in self._left.items() if left >= share]
        return sorted(fitting, key=lambda device: -self._left[device])


def visible() -> list[str]:
    """The names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]
