"""The best arguments of every method: ``flatmtl tune`` and :func:`lightning_flatmtl.tune`."""

from lightning_flatmtl.comparison.tuning.report import TrialReport
from lightning_flatmtl.comparison.tuning.results import Trials
from lightning_flatmtl.comparison.tuning.tuning import tune

__all__ = ["TrialReport", "Trials", "tune"]
