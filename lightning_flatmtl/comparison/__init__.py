"""Many runs, one table: ``flatmtl compare`` and ``flatmtl tune``, from Python too."""

from lightning_flatmtl.comparison.comparison import compare
from lightning_flatmtl.comparison.record import ResumePoint, RunRecord
from lightning_flatmtl.comparison.results import Results
from lightning_flatmtl.comparison.single_tasks import baselines
from lightning_flatmtl.comparison.tuning import TrialReport, Trials, tune

__all__ = [
    "Results",
    "ResumePoint",
    "RunRecord",
    "TrialReport",
    "Trials",
    "baselines",
    "compare",
    "tune",
]
