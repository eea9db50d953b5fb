"""Many runs, one table: ``flatmtl compare`` and :func:`lightning_flatmtl.compare`."""

from lightning_flatmtl.comparison.baselines import baselines
from lightning_flatmtl.comparison.compare import compare
from lightning_flatmtl.comparison.record import ResumePoint, RunRecord
from lightning_flatmtl.comparison.results import Results

__all__ = ["Results", "ResumePoint", "RunRecord", "baselines", "compare"]
