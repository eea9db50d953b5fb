"""The results of a comparison: a row a run."""

from collections.abc import Sequence

from lightning_flatmtl.comparison.jobs import Job, State
from lightning_flatmtl.comparison.rows import Row, Rows

__all__ = ["Results", "Row", "metrics_of", "rows_of"]

_FIRST = (
    "method", "task", "seed", "status", "hash", "seconds_per_step", "peak_memory_mib", "parameters",
)  # fmt: skip
_LAST = ("epochs", "steps", "device", "error")


class Results(Rows):
    """A table of runs; each row is a mapping.

    ==================== ===================================================================
    column               what it is
    ==================== ===================================================================
    ``method``           the name in the file, ``single-task`` for the baselines
    ``task``             the task of a baseline, else empty
    ``seed``             the seed
    ``status``           ``done``, ``failed``, ``queued``, ``running`` or ``running elsewhere``
    ``hash``             of the complete configuration and the package's version
    ``seconds_per_step`` median over epochs of training time per optimizer step
    ``peak_memory_mib``  of tensors on a GPU, of the process on a CPU
    ``parameters``       how many numbers are trained; empty for runs of earlier versions
    ``test/...``         every test metric under its logged name; ``test/delta_m`` too
    ``error``            why it has failed
    ==================== ===================================================================

    Args:
        rows: The rows.
        markdown: The table of means that was written to ``table.md``.
        summary: What was written to ``summary.json``.
        remarks: Why figures are missing, if some are.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        markdown: str = "",
        summary: Row | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, markdown, remarks)
        self.summary = summary or {}

    def __repr__(self) -> str:
        done = sum(row["status"] == State.DONE for row in self)
        return f"Results({len(self)} runs, {done} done)"

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return [*_FIRST, *dict.fromkeys(name for row in self for name in metrics_of(row)), *_LAST]


def metrics_of(row: Row) -> list[str]:
    """The names of the metrics in a row."""
    return [name for name in row if name not in {*_FIRST, *_LAST}]


def rows_of(jobs: Sequence[Job], further: Sequence[str] = ()) -> list[Row]:
    """A row for each job, with what its result says.

    Args:
        jobs: The jobs.
        further: Names of figures that are wanted though they are not of the test data.
    """
    return [_row(job, further) for job in jobs]


def _row(job: Job, further: Sequence[str]) -> Row:
    run, result = job.run, job.folder.result or {}
    final = result.get("final", {})
    row: Row = {
        "method": run.method,
        "task": run.task or "",
        "seed": run.seed,
        "status": job.state.value,
        "hash": run.hash,
        "seconds_per_step": result.get("seconds_per_step"),
        "peak_memory_mib": result.get("peak_memory_mib"),
        "parameters": result.get("parameters"),
        **result.get("metrics", {}),
        **{name: final[name] for name in further if name in final},
    }
    row |= {name: result.get(name) for name in _LAST[:-1]}
    row["error"] = job.error or ""
    return row
