"""Single-task training of every task: what Delta_m is relative to."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_flatmtl.comparison.comparison import Comparison, LauncherName
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.metric_names import is_loss
from lightning_flatmtl.comparison.settings import SINGLE_TASK, Settings, SingleTask
from lightning_flatmtl.comparison.summary import COST, DELTA_M, PARAMETERS

__all__ = ["baselines"]


def baselines(
    config: str | Path | Mapping[str, Any],
    *arguments: str,
    workers: int = 1,
    launcher: LauncherName = "local",
    output: str | Path | None = None,
) -> dict[str, float]:
    """Train each task of a comparison by itself and write the means as baselines.

    ``baselines.yaml`` in the output folder is what ``MultiTaskModule(baselines=...)`` reads. The
    runs are those of the comparison's ``single_task``, which then need not be done again.

    Args:
        config: The file of the comparison; it needs no methods.
        arguments: Further arguments of ``flatmtl fit`` for every run.
        workers: How many runs side by side, at least 1.
        launcher: ``"local"`` or ``"ray"``.
        output: Another folder than the file's.

    Returns:
        Means over the seeds by ``"task/metric"``, without losses.

    Raises:
        ValueError: As :func:`lightning_flatmtl.compare`.
        RuntimeError: If a run has failed.
    """
    settings = Settings.load(config, arguments, output, needs_methods=False)
    if settings.single_task is None:
        settings = replace(settings, single_task=SingleTask())
    comparison = Comparison(settings, [SINGLE_TASK])
    results = comparison.run(workers, launcher)
    singles = [row for row in results if row["method"] == SINGLE_TASK]
    failed = [row for row in singles if row["status"] != "done"]
    if failed:
        row = failed[0]
        raise RuntimeError(
            f"The baseline of task '{row['task']}', seed {row['seed']}, is missing: {row['error']}"
        )
    found = means(results.summary)
    write_whole(comparison.output / "baselines.yaml", yaml.safe_dump(found, sort_keys=False))
    return found


def means(summary: Mapping[str, Any]) -> dict[str, float]:
    """The means of the single-task runs, by the names that baselines have."""
    figures = summary["methods"].get(SINGLE_TASK, {})
    return {
        name.removeprefix("test/"): figure["mean"]
        for name, figure in figures.items()
        if name not in {DELTA_M, COST, PARAMETERS}
        and not name.startswith("average/")
        and not is_loss(name)
    }
