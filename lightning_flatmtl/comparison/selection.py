"""Which of a run's epochs is tested; decided by validation data alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["Selection"]

_FORMS = "`last`, `{monitor: val/loss, mode: min}` or `{mean_of_last: 10}`"


@dataclass(frozen=True)
class Selection:
    """The epochs of a run that are tested.

    The last one; the one with the best value of a figure logged in validation; or several last
    ones, whose test metrics are averaged.

    Args:
        monitor: The logged name, ``None`` for the last epochs.
        mode: ``"min"`` or ``"max"``, what is best.
        count: How many last epochs.
    """

    monitor: str | None = None
    mode: str = "min"
    count: int = 1

    @classmethod
    def of(cls, given: Any) -> "Selection":
        """Read what a file says: a word or a mapping.

        Raises:
            ValueError: If it is neither, or the figure is one of the test data.
        """
        if given is None or given == "last":
            return cls()
        if not isinstance(given, Mapping):
            raise ValueError(f"`select` must be {_FORMS}, got {given!r}.")
        if set(given) == {"mean_of_last"}:
            count = given["mean_of_last"]
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"`mean_of_last` must be an integer >= 1, got {count!r}.")
            return cls(count=count)
        monitor, mode = given.get("monitor"), given.get("mode", "min")
        if not set(given) <= {"monitor", "mode"} or not isinstance(monitor, str) or not monitor:
            raise ValueError(f"`select` must be {_FORMS}, got {dict(given)!r}.")
        if mode not in {"min", "max"}:
            raise ValueError(f"`mode` of `select` must be 'min' or 'max', got {mode!r}.")
        if monitor.startswith("test"):
            raise ValueError(
                f"`select` must choose by validation data, got {monitor!r}: a model that is chosen "
                "by the test data makes its test figures worthless. Monitor what is logged in "
                "validation, such as 'val/loss'."
            )
        return cls(monitor, mode)

    @property
    def setting(self) -> str | dict[str, Any]:
        """What a file would say."""
        if self.monitor is not None:
            return {"monitor": self.monitor, "mode": self.mode}
        return "last" if self.count == 1 else {"mean_of_last": self.count}

    def checkpoint(self, callbacks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The ModelCheckpoint that is needed beside ``callbacks``; ``None`` if none is.

        Args:
            callbacks: What the configuration of the run has.
        """
        if self.monitor is not None:
            if any(self._is_kept_by(callback) for callback in callbacks):
                return None
            kept: dict[str, Any] = {
                "monitor": self.monitor,
                "mode": self.mode,
                "filename": "selected",
            }
        elif self.count > 1:
            kept = {"monitor": "epoch", "mode": "max", "save_top_k": self.count}
            kept |= {"filename": "{epoch}", "save_on_train_epoch_end": True}
        else:
            return None
        return {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {**kept, "auto_insert_metric_name": False},
        }

    def checkpoints(self, trainer: Trainer) -> list[Path | None]:
        """The checkpoints to test after the fit; ``None`` for the model as it is.

        Raises:
            RuntimeError: If none was saved.
        """
        if self.monitor is None and self.count == 1:
            return [None]
        mode = "max" if self.monitor is None else self.mode
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.mode != mode:
                continue
            if callback.monitor == (self.monitor or "epoch"):
                paths = _in_order(callback) if self.monitor is None else [callback.best_model_path]
                found: list[Path | None] = [Path(path) for path in paths if path]
                if found:
                    return found
        raise RuntimeError(
            f"No checkpoint was saved by {self.setting}: expected `{self.monitor or 'epoch'}` to "
            "be there after validation. Is there validation data, and is the figure logged?"
        )

    def _is_kept_by(self, callback: Mapping[str, Any]) -> bool:
        given = callback.get("init_args") or {}
        return (
            callback["class_path"].endswith("ModelCheckpoint")
            and given.get("monitor") == self.monitor
            and given.get("mode", "min") == self.mode
            and given.get("save_top_k", 1) != 0
        )


def _in_order(callback: ModelCheckpoint) -> list[str]:
    """The kept checkpoints, that of the earliest epoch first."""
    return sorted(callback.best_k_models, key=lambda path: float(callback.best_k_models[path]))
