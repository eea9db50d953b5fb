"""The study of a method in Optuna: its budget, its next trial, what it belongs to."""

import datetime
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.jobs import Job
from lightning_flatmtl.comparison.plan import Run, difference
from lightning_flatmtl.comparison.resolving import Config, set_key
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.tuning.named import build, has_argument, optuna
from lightning_flatmtl.comparison.tuning.plan import Searched
from lightning_flatmtl.comparison.tuning.settings import TuneSettings
from lightning_flatmtl.comparison.tuning.trial import (
    EXHAUSTED,
    FOLDER,
    SURPLUS,
    Trial,
    claim,
    slug,
    told,
)

__all__ = ["SEARCH_FILE", "MethodStudy"]

SEARCH_FILE = "search.yaml"
"""In the folder of a search: what its trials' processes must know."""

_REPORT = "lightning_flatmtl.comparison.TrialReport"
_BELONGS_TO = "search"
"""The attribute of a study that says what its trials have in common."""

_FORGOTTEN = datetime.timedelta(minutes=1)
"""After this time a trial that nobody has taken was left by a process that was killed."""


class MethodStudy:
    """The trials of a method.

    Args:
        method: The method and its arguments.
        settings: The search.
        storage: The storage of Optuna.
        direction: ``"minimize"`` or ``"maximize"``.
        folder: Where the trials of this folder are, and its name among others.
        belongs_to: What the trials have in common.

    Raises:
        ValueError: If the storage has another study of this name.
    """

    def __init__(
        self,
        method: Searched,
        settings: TuneSettings,
        storage: Any,
        direction: str,
        folder: tuple[Path, str],
        belongs_to: Mapping[str, Any],
    ) -> None:
        self.method, self.settings = method, settings
        self._folder, self._folder_name = folder
        self._seeded = has_argument("sampler", settings.sampler, "seed") is True
        self.study = optuna().create_study(
            study_name=f"{settings.name}: {method.name}",
            storage=storage,
            direction=direction,
            sampler=build("sampler", settings.sampler),
            pruner=build("pruner", settings.pruner),
            load_if_exists=True,
        )
        self._belong(belongs_to)

    @property
    def budget(self) -> int:
        """How many trials it has; one where there is nothing to search."""
        return self.settings.budget(self.method.spaces)

    @property
    def trials(self) -> list[Any]:
        """Those of the budget."""
        every = self.study.get_trials(deepcopy=False)
        return [trial for trial in every if SURPLUS not in trial.user_attrs]

    @property
    def left(self) -> int:
        """How many are still to be begun."""
        if EXHAUSTED in self.study.user_attrs:
            return 0
        begun = [trial for trial in self.trials if trial.state.name != "WAITING"]
        return max(0, self.budget - len(begun))

    def resumed(self) -> Trial | None:
        """A trial that was broken off, to go on with; ``None`` if there is none."""
        for frozen in self.trials:
            if frozen.state.name == "RUNNING" and self._is_ours(frozen):
                lock = claim(self._folder, self.method.name, frozen.number)
                if lock is not None and not self._is_running(frozen.number):
                    lock.release()  # it has just ended
                elif lock is not None:
                    trial = optuna().trial.Trial(self.study, frozen._trial_id)
                    return self._begun(trial, lock)
        return None

    def asked(self) -> Trial | None:
        """A further trial; ``None`` if the budget is spent."""
        if self.left == 0:
            return None
        number = len(self.study.get_trials(deepcopy=False))
        if self._seeded:
            # A seed for each trial: a search that goes on does not begin the same numbers again.
            self.study.sampler = build("sampler", self.settings.sampler, seed=self._seed(number))
        trial = self.study.ask()
        lock = claim(self._folder, self.method.name, trial.number)
        begun = sum(t.number < trial.number for t in self.trials)
        if lock is None or begun >= self.budget:  # another process came first
            trial.set_user_attr(SURPLUS, True)
            told(self.study, trial.number, "FAIL")
            return None
        return self._begun(trial, lock)

    def _seed(self, number: int) -> int:
        return random.Random(f"{self.settings.runs.seeds[0]} {number}").getrandbits(31)

    def _is_ours(self, frozen: Any) -> bool:
        """Whether it runs in this folder, or nowhere: its process ended before it could say."""
        where = frozen.user_attrs.get(FOLDER)
        if where is None:
            return bool(datetime.datetime.now() - frozen.datetime_start > _FORGOTTEN)
        return bool(where == self._folder_name)

    def _is_running(self, number: int) -> bool:
        found: str = self.study.get_trials(deepcopy=False)[number].state.name
        return found == "RUNNING"

    def _begun(self, trial: Any, lock: Any) -> Trial:
        trial.set_user_attr(FOLDER, self._folder_name)
        values = {name: space.suggest(trial, name) for name, space in self.method.spaces.items()}
        settings = self.settings
        jobs = self._jobs(self.method.configured(values), trial.number)
        runs = settings.runs
        return Trial(self.method.name, trial, values, settings.metric, runs.select, jobs, lock)

    def _jobs(self, config: Config, number: int) -> list[Job]:
        jobs = []
        for place, seed in enumerate(self.settings.runs.seeds):
            seeded = config
            for key in self.settings.runs.seed_keys:
                seeded = set_key(seeded, key, seed)
            if place == 0:
                seeded = _with_callback(seeded, self._report(number))
            run = Run(self.method.name, seed, seeded, Selection(), tested=False)
            name = f"{slug(self.method.name)}-{number}-seed{seed}-{run.hash[:8]}"
            jobs.append(Job(run, RunFolder((self._folder / name).absolute())))
        return jobs

    def _report(self, number: int) -> dict[str, Any]:
        given = {
            "search": str((self._folder.parent / SEARCH_FILE).absolute()),
            "study": self.study.study_name,
            "trial": number,
            "metric": self.settings.metric,
        }
        return {"class_path": _REPORT, "init_args": given}

    def _belong(self, belongs_to: Mapping[str, Any]) -> None:
        """Refuse trials of another search."""
        spaces = {name: space.setting for name, space in self.method.spaces.items()}
        own = {**belongs_to, "method": self.method.config, "search": spaces}
        own = json.loads(json.dumps(own, default=str))  # as the storage will give it back
        found = self.study.user_attrs.get(_BELONGS_TO)
        if found is None and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr(_BELONGS_TO, own)
            return
        differs = difference(found or {}, own)
        if differs is not None:
            raise ValueError(
                f"The trials of '{self.method.name}' in the storage belong to another search: "
                f"{differs}. Choose another folder by `--output`, or another `name`."
            )


def _with_callback(config: Config, entry: dict[str, Any]) -> Config:
    callbacks = [*(config["trainer"].get("callbacks") or []), entry]
    return {**config, "trainer": {**config["trainer"], "callbacks": callbacks}}
