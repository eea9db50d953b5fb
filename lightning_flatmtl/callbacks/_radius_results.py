"""What RhoFinder has found: losses against the radius, and the radius that they suggest."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from lightning_flatmtl.callbacks._pictures import need_matplotlib
from lightning_flatmtl.callbacks._radius_picture import Curve, draw_radii
from lightning_flatmtl.callbacks._radius_probe import Key, Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "RhoResults", "RhoRow", "rows_of"]

_RISE = 0.15
"""The share of the losses before training by which the losses may rise."""


@final
@dataclass(frozen=True)
class RhoRow:
    """The loss of one task at one radius.

    Args:
        step: After how many optimizer steps.
        task: The task.
        part: What is perturbed: ``"shared"`` or ``"head"`` parameters.
        adaptive: Whether the perturbation is adaptive.
        rho: Its radius.
        loss: The loss where the parameters are perturbed.
        rise: By how much it is larger than at the parameters as they are.
        cosine: Of the gradient there and the clean one, both of the perturbed parameters.
        gradient: The norm of the gradient there over that of the clean one.
    """

    step: int
    task: str
    part: str
    adaptive: bool
    rho: float
    loss: float
    rise: float
    cosine: float
    gradient: float


COLUMNS = tuple(RhoRow.__dataclass_fields__)


@final
@dataclass(frozen=True)
class RhoResults:
    """What :class:`~lightning_flatmtl.callbacks.RhoFinder` has found.

    Args:
        rows: Every task's loss at every radius.
        begin: The loss of every task before training.
        data: What was looked at: ``"validation"`` or ``"training"``.

    Example:
        >>> import pandas  # doctest: +SKIP
        >>> frame = pandas.DataFrame(results.table())  # doctest: +SKIP
    """

    rows: tuple[RhoRow, ...]
    begin: Mapping[str, float]
    data: str

    @property
    def tasks(self) -> list[str]:
        """The tasks."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def radii(self, adaptive: bool = False) -> list[float]:
        """The radii that were looked at, in increasing order."""
        return sorted({row.rho for row in self.rows if row.adaptive == adaptive})

    def table(self) -> list[dict[str, Any]]:
        """The rows, each by column: ``pandas.DataFrame(results.table())`` is a frame of them."""
        return [asdict(row) for row in self.rows]

    def rise(self, adaptive: bool = False) -> dict[float, float]:
        r"""By radius, how much the losses rise at the end of the warm-up.

        As a share of the losses before training, that of shared parameters and that of heads added
        up, the mean over the tasks:
        :math:`\frac1m \sum_i (\Delta L_i^{shared} + \Delta L_i^{head}) / L_i^0`.

        Args:
            adaptive: Of adaptive perturbations.
        """
        return self._mean_rise(adaptive, ("shared", "head"))

    def killed(self, adaptive: bool = False) -> float | None:
        """The smallest radius that undoes what was learned.

        There the losses, at perturbed shared parameters or at perturbed heads, are in the mean no
        better than before training, or not finite; between two radii that were looked at it is
        interpolated. Training that begins with a quarter of it may die.

        Args:
            adaptive: Of adaptive perturbations.

        Returns:
            The radius; ``None`` if it is larger than those that were looked at, or if nothing was
            learned so far.
        """
        finite = (row for row in self.rows if math.isfinite(row.rise))
        clean = {row.task: row.loss - row.rise for row in finite}
        gains = [self._share(task, self.begin[task] - loss) for task, loss in clean.items()]
        learned = sum(gains) / max(1, len(gains))
        if learned <= 0.0:
            return None
        crossings = [
            _crossing(self._mean_rise(adaptive, (part,)), learned)
            for part in dict.fromkeys(row.part for row in self.rows)
        ]
        return min((radius for radius, reached in crossings if reached), default=None)

    def suggestion(self, adaptive: bool = False) -> float | None:
        """One radius for shared parameters and heads, to two digits.

        The largest, between those that were looked at, that raises the losses by at most 15 % of
        what they were before training (:meth:`rise`).

        Args:
            adaptive: Of adaptive perturbations.

        Returns:
            The radius; ``None`` if it were smaller than those that were looked at.
        """
        radius, _ = _crossing(self.rise(adaptive), _RISE)
        return float(f"{radius:.2g}") if radius >= self.radii(adaptive)[0] else None

    def plot(self, png: str | Path | None = None) -> "Figure":
        """Draw the losses at the end of the warm-up against the radius, with the suggestions.

        Args:
            png: A file to write the figure to.

        Returns:
            The figure of matplotlib.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        need_matplotlib()
        panels = {
            (part, adaptive): self._curves(part, adaptive)
            for part in ("shared", "head")
            for adaptive in (False, True)
            if any((row.part, row.adaptive) == (part, adaptive) for row in self.rows)
        }
        suggested = {adaptive: self.suggestion(adaptive) for _, adaptive in panels}
        title = f"{self.data} batches, after {self.rows[0].step} steps"
        return draw_radii(panels, self.begin, suggested, title, png)

    def markdown(self) -> str:
        """The rises by radius and what they suggest, in Markdown."""
        lines = ["| perturbation | radius | loss, mean | rise / first loss | cosine |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        for adaptive in sorted({row.adaptive for row in self.rows}):
            for rho, rise in self.rise(adaptive).items():
                here = self._at(adaptive, rho)
                here = [row for row in here if row.part == "shared"] or here
                loss, cosine = (fmean(r.loss for r in here), fmean(r.cosine for r in here))
                cells = (loss, rise, cosine)
                name = "adaptive" if adaptive else "plain"
                lines.append(
                    f"| {name} | {rho:.4g} | " + " | ".join(f"{c:.3g}" for c in cells) + " |"
                )
        return "\n".join([*lines, "", *self._words()]) + "\n"

    def _words(self) -> Iterable[str]:
        yield f"On {self.data} batches, after {self.rows[0].step} steps:"
        yield ""
        for adaptive in sorted({row.adaptive for row in self.rows}):
            radius, killed = self.suggestion(adaptive), self.killed(adaptive)
            end = ", adaptive=True" if adaptive else ""
            said = f"suggested: TaskSAM(rho={radius:g}{end})." if radius is not None else ""
            if radius is None:
                said = f"none of these radii is small enough for TaskSAM(rho=...{end})."
            elif not _crossing(self.rise(adaptive), _RISE)[1]:
                said += " None of these radii is too large."
            kills = "" if killed is None else f" About {killed:.2g} undoes what was learned."
            yield f"- {said}{kills}"

    def _at(self, adaptive: bool, rho: float) -> list[RhoRow]:
        return [row for row in self.rows if (row.adaptive, row.rho) == (adaptive, rho)]

    def _mean_rise(self, adaptive: bool, parts: Iterable[str]) -> dict[float, float]:
        found = {}
        for rho in self.radii(adaptive):
            rows = [row for row in self._at(adaptive, rho) if row.part in parts]
            found[rho] = sum(self._share(row.task, row.rise) for row in rows) / len(self.tasks)
        return found

    def _share(self, task: str, rise: float) -> float:
        """A rise as a share of the loss before training, which a task may have had none of."""
        begin = abs(self.begin[task])
        return rise / begin if begin > 0 else math.copysign(math.inf, rise) if rise else 0.0

    def _curves(self, part: str, adaptive: bool) -> dict[str, Curve]:
        return {
            task: [
                (row.rho, row.loss)
                for row in self.rows
                if (row.task, row.part, row.adaptive) == (task, part, adaptive)
            ]
            for task in self.tasks
        }


def rows_of(sums: Sums, step: int) -> list[RhoRow]:
    """The figures behind sums over samples."""
    means = {key: [value / n for value in values] for key, (n, *values) in sums.items() if n}
    rows = []
    for key, (loss, cosine, gradient) in means.items():
        if key.part:
            rise = loss - means[Key(key.task)][0]
            figures = (key.task, key.part, key.adaptive, key.rho, loss, rise, cosine, gradient)
            rows.append(RhoRow(step, *figures))
    return rows


def _crossing(rises: Mapping[float, float], limit: float) -> tuple[float, bool]:
    """Where rises pass a limit, and whether they do; log-linear between two radii.

    The smallest radius, halved, if it is past the limit already; the largest if none is.
    """
    before: tuple[float, float] | None = None
    for rho, rise in rises.items():
        if not rise <= limit:  # NaN, too
            if before is None:
                return rho / 2, True
            if not math.isfinite(rise) or rise <= before[1]:
                return before[0], True
            share = (limit - before[1]) / (rise - before[1])
            return before[0] * (rho / before[0]) ** share, True
        before = rho, rise
    assert before is not None
    return before[0], False
