"""Many runs, one table: ``flatmtl compare`` and :func:`lightning_flatmtl.compare`."""

from lightning_flatmtl.comparison.comparison import compare
from lightning_flatmtl.comparison.record import ResumePoint, RunRecord
from lightning_flatmtl.comparison.results import Results
from lightning_flatmtl.comparison.single_tasks import baselines

__all__ = ["Results", "ResumePoint", "RunRecord", "baselines", "compare"]
