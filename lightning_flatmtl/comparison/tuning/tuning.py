"""The search for the best arguments of every method: what ``flatmtl tune`` does."""

import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_flatmtl import __version__
from lightning_flatmtl.comparison.comparison import LauncherName, make_launcher
from lightning_flatmtl.comparison.directions import by_name
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.reasons import reason
from lightning_flatmtl.comparison.rehearsal import check_logged, rehearsed
from lightning_flatmtl.comparison.tuning.compare_file import write_compare
from lightning_flatmtl.comparison.tuning.display import TrialDisplay, make_display
from lightning_flatmtl.comparison.tuning.figures import write_figures
from lightning_flatmtl.comparison.tuning.named import Entry, build, make_storage, optuna
from lightning_flatmtl.comparison.tuning.plan import make_search
from lightning_flatmtl.comparison.tuning.results import Trials, best_of, rows_of, table_of
from lightning_flatmtl.comparison.tuning.search import search
from lightning_flatmtl.comparison.tuning.settings import TuneSettings
from lightning_flatmtl.comparison.tuning.study import SEARCH_FILE, MethodStudy
from lightning_flatmtl.hosting.names import nearest

__all__ = ["Tuning", "tune"]


def tune(
    config: str | Path | Mapping[str, Any],
    *arguments: str,
    workers: int = 1,
    launcher: LauncherName = "local",
    only: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> Trials:
    """Search the best arguments of each method on validation data, with Optuna.

    Each method has the same number of trials. A trial is one run of ``flatmtl fit`` for each seed,
    in a process of its own; the test data are not used. The folder ``output`` has ``trials.csv``,
    ``compare.yaml`` with the best settings, and ``figures/`` in the end.

    Args:
        config: The file of the search, or a mapping with what it would hold.
        arguments: Further arguments of ``flatmtl fit`` for every trial, such as
            ``"--trainer.max_epochs=2"``.
        workers: How many trials side by side on this machine, at least 1; Ray runs as many as it
            has room for.
        launcher: ``"local"`` for this machine, ``"ray"`` for a Ray cluster.
        only: The methods to search for; all by default. The tables have all that is done.
        output: Another folder than the file's.

    Returns:
        A row for each trial; ``best`` has the best of each method, ``compare`` the written file.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a setting is wrong, the metric is not logged in validation, or the storage
            has trials of another search; nothing has been tried then.
        ModuleNotFoundError: If Optuna, or Ray if it is asked for, is not installed.
        ConnectionError: If Ray is asked for and there is no cluster.
        KeyboardInterrupt: If it is interrupted; called again it goes on.
    """
    return Tuning(TuneSettings.load(config, arguments, output), only).run(workers, launcher)


class Tuning:
    """A search and its folder.

    Args:
        settings: What is searched.
        only: The methods to search for.

    Raises:
        ValueError: If the settings are wrong, or the folder is not one of a search.
        ModuleNotFoundError: If Optuna is not installed.
    """

    def __init__(self, settings: TuneSettings, only: Sequence[str] | None = None) -> None:
        optuna()
        self.settings = settings
        build("sampler", settings.sampler)
        build("pruner", settings.pruner)
        self.base, self.methods = make_search(settings)
        names = [method.name for method in self.methods]
        for name in only or ():
            if name not in names:
                raise ValueError(
                    f"`--only` must name methods of the search, got '{name}'. "
                    f"{nearest(name, names)}It has: {', '.join(names)}."
                )
        self.only = [name for name in names if not only or name in only]
        """The methods to search for."""
        self.output = settings.runs.output.expanduser()
        self._own_folder()

    @property
    def storage(self) -> Entry:
        """How a process opens the storage."""
        if self.settings.storage is not None:
            return self.settings.storage
        return f"sqlite:///{(self.output / 'trials.db').absolute()}"

    def begun(self) -> dict[str, int]:
        """How many trials each method has; nothing is written."""
        found = dict.fromkeys(self.only, 0)
        if self.settings.storage is None and not (self.output / "trials.db").is_file():
            return found
        with _quiet():
            storage = make_storage(self.storage)
            known = {s.study_name: s.n_trials for s in optuna().get_all_study_summaries(storage)}
        return {name: known.get(f"{self.settings.name}: {name}", 0) for name in found}

    def budget(self, method: str) -> int:
        """How many trials a method is to have."""
        spaces = next(each.spaces for each in self.methods if each.name == method)
        return self.settings.budget(spaces)

    def run(
        self,
        workers: int = 1,
        launcher: LauncherName = "local",
        display: TrialDisplay | None = None,
    ) -> Trials:
        """Spend what is left of the budgets and write the results, also if it is interrupted."""
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"`workers` must be an integer >= 1, got {workers!r}.")
        starts = make_launcher(launcher, workers, self.settings.runs.resources)
        try:
            with _quiet():
                name = self._prepare()
                direction = self._rehearse(starts)
                storage = make_storage(self.storage)
                belongs_to = self._belongs_to(direction)
                studies = [
                    MethodStudy(
                        method, self.settings, storage, direction,
                        (self.output / "trials", name), belongs_to,
                    )
                    for method in self.methods
                ]  # fmt: skip
                chosen = [study for study in studies if study.method.name in self.only]

                def left() -> dict[str, int]:
                    return {study.method.name: study.left for study in chosen}

                try:
                    search(chosen, starts, display or make_display(left, workers))
                finally:
                    trials = self._write(studies, direction)
        finally:
            starts.close()
        return trials

    def _own_folder(self) -> None:
        """Refuse a folder that holds something else."""
        own = self.output / SEARCH_FILE
        if not own.is_file() and self.output.is_dir() and any(self.output.iterdir()):
            raise ValueError(
                f"The folder '{self.output}' is not empty and holds no search. Choose another "
                "folder by `--output`, or remove this one."
            )

    def _prepare(self) -> str:
        """Make the folder; returns its name among the folders that share a storage."""
        own, folder = self.output / SEARCH_FILE, uuid.uuid4().hex
        if own.is_file():
            folder = str(yaml.safe_load(own.read_text(encoding="utf-8"))["folder"])
        content = {"folder": folder, "storage": self.storage, "pruner": self.settings.pruner}
        write_whole(own, yaml.safe_dump(content, sort_keys=False))
        return folder

    def _rehearse(self, launcher: Launcher) -> str:
        """Try one batch of the base; returns the direction of the metric.

        Raises:
            ValueError: If it fails, the metric is not logged, or its direction is unknown.
        """

        def folder_of(slug: str) -> RunFolder:
            return RunFolder((self.output / "trials" / slug).absolute())

        runs, metric = self.settings.runs, self.settings.metric
        result = rehearsed(self.base, runs.seeds[0], folder_of, launcher, tested=False)
        if result is None:
            (log, *_) = sorted((self.output / "trials").glob("rehearsal-*/log.txt")) or [Path()]
            raise ValueError(
                f"One batch of `config` must run before the search begins, and it failed: "
                f"{reason(log, 1)} Its log: {log}"
            )
        logged = list(result["final"])
        check_logged("`metric`", metric, logged)
        if runs.select.monitor is not None:
            check_logged("`monitor` of `select`", runs.select.monitor, logged)
        if self.settings.direction is not None:
            return self.settings.direction
        higher = by_name(metric, result["higher_is_better"])
        if higher is None:
            raise ValueError(
                f"`direction` must be given for '{metric}', which does not say whether higher is "
                "better: add `direction: maximize` or `direction: minimize`."
            )
        return "maximize" if higher else "minimize"

    def _belongs_to(self, direction: str) -> dict[str, Any]:
        runs = self.settings.runs
        return {
            "metric": self.settings.metric,
            "direction": direction,
            "select": runs.select.setting,
            "seeds": list(runs.seeds),
            "version": __version__,
        }

    def _write(self, studies: Sequence[MethodStudy], direction: str) -> Trials:
        """Write tables, figures and the best settings."""
        settings = self.settings
        rows = rows_of(studies)
        best = {study.method.name: best_of(study) for study in studies}
        known = {name: found for name, found in best.items() if found is not None}
        markdown = table_of(settings.metric, direction, rows, best)
        path = self.output / "compare.yaml"
        trials = Trials(rows, known, markdown, path if known else None)
        pairs = {study.method.name: (study.method, best[study.method.name]) for study in studies}
        try:
            write_whole(self.output / "trials.csv", trials.to_csv())
            write_whole(self.output / "table.md", markdown)
            if known:
                write_compare(path, settings, direction, pairs)
        except OSError as error:  # a full disk; what is known is still returned and printed
            warnings.warn(f"The results could not be written: {error}.", UserWarning, stacklevel=2)
        spaces = {method.name: method.spaces for method in self.methods}
        args = (rows, known, settings.metric, direction, spaces)
        trials.remarks = (*_remarks(studies), *write_figures(self.output / "figures", *args))
        return trials


def _remarks(studies: Sequence[MethodStudy]) -> Iterator[str]:
    """What failed, and what is missing."""
    for study in studies:
        name = study.method.name
        if study.budget == 1 and not study.method.spaces:
            yield f"{name}: has none of the searched arguments, so it has one trial."
        errors = [row["error"] for row in rows_of([study]) if row["state"] == "failed"]
        for error in dict.fromkeys(errors):
            yield f"{name}: {errors.count(error)} failed: {error}"
        running = sum(trial.state.name == "RUNNING" for trial in study.trials)
        if running:
            yield f"{name}: {running} broken off or running elsewhere."
        if study.left:
            yield f"{name}: {study.left} not begun."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's line for every study and trial; we have our own."""
    logging = optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)
