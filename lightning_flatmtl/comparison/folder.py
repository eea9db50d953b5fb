"""The folder of a run: what is kept there, and who may write to it."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.plan import Run

__all__ = ["RunFolder"]

_RECORD = "lightning_flatmtl.comparison.RunRecord"
_RESUME = "lightning_flatmtl.comparison.ResumePoint"


class RunFolder:
    """Files of one run. Nothing here is ever half written.

    ============================ ==========================================================
    ``run.yaml``                 the configuration, to be run by ``flatmtl fit --config``
    ``log.txt``                  what the run has printed
    ``progress.json``            where it is
    ``curves.csv``               what was logged at the end of each epoch
    ``checkpoints/resume.ckpt``  the end of the latest epoch, to go on from
    ``result.json``              test metrics and cost; it is there when the run is done
    ``failure.json``             why it has failed
    ``node.json``                which node of a Ray cluster has begun it
    ============================ ==========================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "run.yaml"
        self.log = path / "log.txt"
        self.curves = path / "curves.csv"
        self.checkpoints = path / "checkpoints"
        self.resume = self.checkpoints / "resume.ckpt"
        self._lock = FileLock(path / "lock")

    def prepare(self, run: Run) -> None:
        """Write the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(_placed(run, self), sort_keys=False))

    # What is known of the run.

    @property
    def result(self) -> dict[str, Any] | None:
        """The result; ``None`` while the run is not done."""
        return _read(self.path / "result.json")

    @result.setter
    def result(self, content: Mapping[str, Any]) -> None:
        write_whole(self.path / "result.json", json.dumps(content, indent=1))
        for name in ("failure.json", "progress.json"):
            (self.path / name).unlink(missing_ok=True)

    @property
    def progress(self) -> dict[str, Any]:
        """Where the run is; empty before its first batch."""
        return _read(self.path / "progress.json") or {}

    @progress.setter
    def progress(self, content: Mapping[str, Any]) -> None:
        write_whole(self.path / "progress.json", json.dumps(content))

    @property
    def failure(self) -> str | None:
        """Why the run has failed, ``None`` if it has not."""
        content = _read(self.path / "failure.json")
        return None if content is None else str(content["error"])

    @failure.setter
    def failure(self, error: str | None) -> None:
        if error is None:
            (self.path / "failure.json").unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):  # a full disk is not to stop the other runs
            write_whole(self.path / "failure.json", json.dumps({"error": error}))

    # Who may write.

    def claim(self) -> bool:
        """Take the run for this process, until it ends; ``False`` if another process has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    @property
    def claimed(self) -> bool:
        """Whether a process is at this run."""
        if not self.path.is_dir() or not self.claim():
            return self.path.is_dir()
        self.release()
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def _placed(run: Run, folder: RunFolder) -> dict[str, Any]:
    """The configuration of a run with all it writes in its folder."""
    config = run.config
    trainer = config["trainer"]
    callbacks = list(trainer.get("callbacks") or [])
    path = str(folder.path)
    checkpoint = run.select.checkpoint(callbacks)
    if checkpoint is not None:
        callbacks.append(checkpoint)
    callbacks = [_placed_checkpoint(each, folder, i) for i, each in enumerate(callbacks)]
    callbacks.append({"class_path": _RESUME, "init_args": {"folder": path}})
    record: dict[str, Any] = {"folder": path, "select": run.select.setting}
    if not run.tested:
        record["test"] = False
    callbacks.append({"class_path": _RECORD, "init_args": record})
    placed = {
        **trainer,
        "callbacks": callbacks,
        "logger": _placed_logger(trainer.get("logger"), run, path),
        "default_root_dir": path,
        "enable_checkpointing": True,
        "enable_progress_bar": False,
    }
    return {**config, "trainer": _named(placed, path)}


def _named(value: Any, folder: str) -> Any:
    """The same with ``{run}`` in texts replaced by the folder, for files that callbacks write."""
    if isinstance(value, str):
        return value.replace("{run}", folder)
    if isinstance(value, list):
        return [_named(each, folder) for each in value]
    if isinstance(value, Mapping):
        return {key: _named(each, folder) for key, each in value.items()}
    return value


def _placed_checkpoint(callback: dict[str, Any], folder: RunFolder, index: int) -> dict[str, Any]:
    """A ModelCheckpoint that saves into a place of its own in the folder of the run."""
    if not callback["class_path"].endswith("ModelCheckpoint"):
        return callback
    # A run that goes on finds files of its own there: no reason for names with versions.
    placed = {"dirpath": str(folder.checkpoints / str(index)), "enable_version_counter": False}
    return {**callback, "init_args": {**(callback.get("init_args") or {}), **placed}}


def _placed_logger(logger: Any, run: Run, folder: str) -> Any:
    """A logger that writes into the folder of the run."""
    if isinstance(logger, list):
        return [_placed_logger(each, run, folder) for each in logger]
    if not isinstance(logger, Mapping):
        return logger
    given = dict(logger.get("init_args") or {})
    if "save_dir" in given:
        given["save_dir"] = folder
    if "name" in given:
        given["name"] = "logs" if _is_local(logger) else run.name
    return {**logger, "init_args": given}


def _is_local(logger: Mapping[str, Any]) -> bool:
    return logger["class_path"].rpartition(".")[2] in {"CSVLogger", "TensorBoardLogger"}
