"""The configurations of a benchmark, two steps of every row on small data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison.plan import Run, make_plan
from lightning_flatmtl.comparison.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.logger=false")


def rows(comparison: Path, *arguments: str, only: Sequence[str] | None = None) -> dict[str, Run]:
    """The first seed's run of every row; single tasks as ``single-task {task}``.

    With ``only`` of those rows alone: reading a configuration takes half a second a row.
    """
    settings = Settings.load(comparison, [*arguments, *QUIET])
    if only is not None:
        methods = {name: settings.methods[name] for name in only}
        settings = replace(settings, methods=methods, single_task=None)
    plan = make_plan(settings)
    seed = plan.runs[0].seed
    return {
        f"{run.method} {run.task}" if run.task else run.method: run
        for run in plan.runs
        if run.seed == seed
    }


def two_steps(runs: Sequence[Run], folder: Path) -> None:
    """Train each for two steps, and validate and test it, as ``flatmtl`` does."""
    for number, run in enumerate(runs):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(run.config))
        for command in ("fit", "test"):
            main([command, f"--config={path}", "--trainer.fast_dev_run=2"])
