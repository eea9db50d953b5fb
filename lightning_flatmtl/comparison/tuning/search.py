"""Trials are asked for, run side by side and told, until every budget is spent."""

import time
from collections.abc import Sequence

from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.tuning.display import TrialDisplay
from lightning_flatmtl.comparison.tuning.study import MethodStudy
from lightning_flatmtl.comparison.tuning.trial import Trial
from lightning_flatmtl.comparison.work import TICK, end_all, termination_as_interrupt

__all__ = ["search"]


def search(studies: Sequence[MethodStudy], launcher: Launcher, display: TrialDisplay) -> None:
    """Spend the budget of every study; a trial that fails does not stop the others.

    Args:
        studies: In the order of the methods.
        launcher: What starts runs.
        display: What shows them.

    Raises:
        KeyboardInterrupt: If it is interrupted; by then all processes have ended, and their trials
            go on next time.
    """
    running: list[Trial] = []
    with termination_as_interrupt(), display:
        try:
            while True:
                _begin(studies, running, launcher, display)
                for trial in list(running):
                    trial.poll(launcher)
                    if trial.said is not None:
                        running.remove(trial)
                        display.ended(trial)
                display.show(running)
                if not running and not any(study.left for study in studies):
                    return
                time.sleep(TICK)
        finally:
            end_all(running)


def _begin(
    studies: Sequence[MethodStudy],
    running: list[Trial],
    launcher: Launcher,
    display: TrialDisplay,
) -> None:
    """Begin trials while there is room: those that were broken off, then of the least advanced."""
    while launcher.has_room(len(running)):
        trial = _next(studies)
        if trial is None:
            return
        running.append(trial)
        display.begun(trial)


def _next(studies: Sequence[MethodStudy]) -> Trial | None:
    for study in studies:
        if (trial := study.resumed()) is not None:
            return trial
    for study in sorted(studies, key=lambda study: len(study.trials)):
        if (trial := study.asked()) is not None:
            return trial
    return None
