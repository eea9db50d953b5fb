"""A run of one batch before all others, to see what the model logs."""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.metric_names import named
from lightning_flatmtl.comparison.plan import Run
from lightning_flatmtl.comparison.record import RunRecord
from lightning_flatmtl.comparison.resolving import Config
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.hosting.names import nearest

__all__ = ["check_logged", "rehearse", "rehearsed"]

_ONE_BATCH = {
    "max_epochs": 1,
    "min_epochs": None,
    "max_steps": 1,
    "min_steps": None,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
    "overfit_batches": 0.0,
    "logger": False,
    "enable_model_summary": False,
}


def rehearse(
    settings: Settings, base: Config, folder_of: Callable[[str], RunFolder], launcher: Launcher
) -> None:
    """Refuse metrics and monitors that no run will log, before the first run starts.

    It takes the base for one batch. What fails here tells nothing; the runs will say why.

    Raises:
        ValueError: If a metric or a monitored figure is not logged.
    """
    named_figures = (settings.metrics, settings.delta_m, settings.select.monitor)
    if all(figure is None for figure in named_figures):
        return
    result = rehearsed(base, settings.seeds[0], folder_of, launcher)
    if result is None:
        return
    shown = [*result["metrics"], *result["final"]]
    if settings.metrics is not None:
        shown = named(settings.metrics, shown)
    if settings.delta_m is not None:
        named(settings.delta_m, shown, "delta_m")
    if settings.select.monitor is not None:
        check_logged("`monitor` of `select`", settings.select.monitor, list(result["final"]))


def rehearsed(
    base: Config,
    seed: int,
    folder_of: Callable[[str], RunFolder],
    launcher: Launcher,
    *,
    tested: bool = True,
) -> dict[str, Any] | None:
    """The result of a run of one batch, which is kept in its folder; ``None`` if it fails."""
    config = copy.deepcopy(base)
    config["trainer"] |= _ONE_BATCH
    run = Run("rehearsal", seed, config, Selection(), tested=tested)
    folder = folder_of(run.slug)
    if folder.result is None:
        folder.prepare(run)
        process = launcher.start(folder)
        try:
            while process.status() is None:
                time.sleep(0.1)
            elsewhere = process.status() == RunRecord.ELSEWHERE
            while elsewhere and folder.claimed:  # another command rehearses the same
                time.sleep(0.1)
        finally:
            process.stop()
    return folder.result


def check_logged(setting: str, monitor: str, logged: Sequence[str]) -> None:
    """Refuse a figure that is not logged in validation.

    Raises:
        ValueError: If it is not.
    """
    if monitor in logged:
        return
    raise ValueError(
        f"{setting} must be logged in validation, got '{monitor}'. "
        f"{nearest(monitor, logged)}Logged are: {', '.join(logged)}."
    )
