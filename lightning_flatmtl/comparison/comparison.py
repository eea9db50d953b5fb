"""Many runs, one table: what ``flatmtl compare`` and ``lightning_flatmtl.compare`` do."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from lightning_flatmtl import __version__
from lightning_flatmtl.comparison.display import Display, make_display
from lightning_flatmtl.comparison.figures import write_figures
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.jobs import Job, State
from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.launchers.local import LocalLauncher
from lightning_flatmtl.comparison.plan import Plan, difference, make_plan
from lightning_flatmtl.comparison.rehearsal import rehearse
from lightning_flatmtl.comparison.results import Results, rows_of
from lightning_flatmtl.comparison.settings import Resources, Settings
from lightning_flatmtl.comparison.summary import summarize
from lightning_flatmtl.comparison.table import latex, markdown
from lightning_flatmtl.comparison.work import work_off

__all__ = ["Comparison", "compare"]

LauncherName = Literal["local", "ray"]


def compare(
    config: str | Path | Mapping[str, Any],
    *arguments: str,
    workers: int = 1,
    launcher: LauncherName = "local",
    only: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> Results:
    """Train methods over seeds and write the table; what is done already is not done again.

    Each run is a process of its own. The folder ``output`` has ``results.csv``, ``table.md``,
    ``table.tex``, ``summary.json`` and ``figures/`` in the end.

    Args:
        config: The file of the comparison, or a mapping with what it would hold.
        arguments: Further arguments of ``flatmtl fit`` for every run, such as
            ``"--trainer.max_epochs=2"``.
        workers: How many runs side by side on this machine, at least 1; Ray runs as many as it has
            room for.
        launcher: ``"local"`` for this machine, ``"ray"`` for a Ray cluster.
        only: The methods to run; all by default. The table has all that is done.
        output: Another folder than the file's.

    Returns:
        A row for each run, ``markdown`` with the table and ``summary`` with its numbers.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting is wrong, a class or metric is unknown, or the folder belongs to
            another comparison; nothing has been trained then.
        ModuleNotFoundError: If Ray is asked for and not installed.
        ConnectionError: If Ray is asked for and there is no cluster.
        KeyboardInterrupt: If it is interrupted; called again it goes on.
    """
    comparison = Comparison(Settings.load(config, arguments, output), only)
    return comparison.run(workers, launcher)


class Comparison:
    """A comparison and its folder.

    Args:
        settings: What is compared.
        only: The methods to run; the table has all that is done.

    Raises:
        ValueError: If the settings are wrong, or the folder belongs to another comparison.
    """

    def __init__(self, settings: Settings, only: Sequence[str] | None = None) -> None:
        self.settings = settings
        self.plan = make_plan(settings)
        chosen = self.plan.methods(only)
        self.output = settings.output.expanduser()
        self._own_folder(self.plan)
        self.jobs = [Job(run, self._folder(run.slug)) for run in self.plan.runs]
        for job in self.jobs:
            job.look()
        self.chosen = [job for job in self.jobs if job.run.method in chosen]
        """The jobs to be worked off."""
        for job in self.jobs:
            if job not in self.chosen:
                job.recall()

    def _folder(self, slug: str) -> RunFolder:
        return RunFolder((self.output / "runs" / slug).absolute())

    def _own_folder(self, plan: Plan) -> None:
        """Refuse a folder whose runs are not comparable with these."""
        path = self.output / "comparison.yaml"
        own = {"select": self.settings.select.setting, "base": plan.base}
        if path.is_file():
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            differs = difference({k: found.get(k) for k in own}, own)
            if differs is not None:
                raise ValueError(
                    f"The folder '{self.output}' holds another comparison: {differs}. Choose "
                    "another folder by `--output`, or remove this one."
                )
        elif self.output.is_dir() and any(self.output.iterdir()):
            raise ValueError(
                f"The folder '{self.output}' is not empty and holds no comparison. Choose another "
                "folder by `--output`, or remove this one."
            )

    def prepare(self) -> None:
        """Write the configuration of every run."""
        own = {
            "select": self.settings.select.setting,
            "base": self.plan.base,
            "version": __version__,
        }
        write_whole(self.output / "comparison.yaml", yaml.safe_dump(own, sort_keys=False))
        for job in self.chosen:
            if job.state is State.QUEUED:
                job.folder.prepare(job.run)

    def run(
        self, workers: int = 1, launcher: LauncherName = "local", display: Display | None = None
    ) -> Results:
        """Run what is not done yet and write the results, also if it is interrupted."""
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"`workers` must be an integer >= 1, got {workers!r}.")
        starts = make_launcher(launcher, workers, self.settings.resources)
        try:
            self.prepare()
            if any(job.state is State.QUEUED for job in self.chosen):
                rehearse(self.settings, self.plan.base, self._folder, starts)
            try:
                work_off(self.chosen, starts, display or make_display(workers))
            finally:
                results = self.write()
        finally:
            starts.close()
        return results

    def write(self) -> Results:
        """Write tables and figures of what is done."""
        settings = self.settings
        rows = rows_of(self.jobs, settings.metrics or ())
        summary = summarize(
            rows,
            list(dict.fromkeys(job.run.method for job in self.jobs if not job.run.task)),
            self.plan.tasks,
            wanted=settings.metrics,
            improving=settings.delta_m,
            directions={**_said(self.jobs), **settings.higher_is_better},
            reference=next((m for m, callbacks in settings.methods.items() if not callbacks), None),
        )
        content = {"version": __version__, **summary.as_json()}
        results = Results(rows, markdown(summary), content)
        files = {
            "results.csv": results.to_csv(),
            "table.md": results.markdown,
            "table.tex": latex(summary),
            "summary.json": json.dumps(content, indent=1),
        }
        try:
            for name, text in files.items():
                write_whole(self.output / name, text)
        except OSError as error:  # a full disk; what is known is still returned and printed
            warnings.warn(f"The results could not be written: {error}.", UserWarning, stacklevel=2)
        results.remarks = write_figures(
            self.output / "figures", summary, list(settings.methods), _curves(self.jobs)
        )
        return results


def make_launcher(name: LauncherName, workers: int, resources: Resources) -> Launcher:
    """The launcher of a name.

    Raises:
        ValueError: If there is none.
        ModuleNotFoundError: If it needs a package that is not installed.
        ConnectionError: If there is no cluster.
    """
    if name == "local":
        return LocalLauncher(workers, resources)
    if name == "ray":
        from lightning_flatmtl.comparison.launchers.ray import RayLauncher  # noqa: PLC0415

        return RayLauncher(resources)
    raise ValueError(f"`launcher` must be 'local' or 'ray', got {name!r}.")


def _said(jobs: Sequence[Job]) -> dict[str, bool]:
    """The directions that the metrics of the runs declare."""
    found: dict[str, bool] = {}
    for job in jobs:
        found |= (job.folder.result or {}).get("higher_is_better", {})
    return found


def _curves(jobs: Sequence[Job]) -> dict[str, list[Path]]:
    """The curves of what is done, by method; those of one task alone are no curves of a method."""
    found: dict[str, list[Path]] = {}
    for job in jobs:
        if job.state is State.DONE and not job.run.task:
            found.setdefault(job.run.method, []).append(job.folder.curves)
    return found
