"""LossLandscape: the loss of every task along random directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, final

import torch
from typing_extensions import override

from lightning_flatmtl.callbacks._directions import filter_normalised
from lightning_flatmtl.callbacks._evaluation import Explorer
from lightning_flatmtl.callbacks._landscape_picture import draw_curves, draw_surfaces
from lightning_flatmtl.callbacks._survey import Run, Survey, is_positive

__all__ = ["LossLandscape"]

_POINTS = {1: 41, 2: 21}


@dataclass(frozen=True)
class _Landscape:
    """Losses of every task at the points of a grid, in its order."""

    losses: dict[str, list[float]]
    points: list[tuple[float, ...]]


@final
class LossLandscape(Survey[_Landscape]):
    r"""Draws the loss of every task around the parameters, along filter-normalised directions.

    In one dimension :math:`L_i(\theta + x\,\delta)`, in two
    :math:`L_i(\theta + x\,\delta + y\,\eta)`, for random :math:`\delta` and :math:`\eta` in which
    every filter is as long as the filter of the network that it moves,

    .. math::

        \delta_f = \frac{z_f}{\lVert z_f \rVert}\,\lVert \theta_f \rVert,
        \qquad z \sim \mathcal N(0, I),

    so that networks whose weights differ in scale may be compared (Li et al., *Visualizing the Loss
    Landscape of Neural Nets*, 2018, `arXiv:1712.09913 <https://arxiv.org/abs/1712.09913>`_; Phan et
    al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_, Figure 5). A filter is a slice of a
    parameter along its first axis: the weights into one channel or neuron. Trunk and heads move
    together; all tasks see the same directions, and so does every process.

    ===================================== =========================================================
    logged                                what it is
    ===================================== =========================================================
    ``landscape/{task}/loss``             the task's loss at the centre
    ``landscape/{task}/rise``             how much higher it is at ``radius``: the mean over the
                                          ends of the axes, two in one dimension, four in two
    ``landscape/{task}/max_rise``         how much higher it is at most on the grid
    ===================================== =========================================================

    Losses are taken in evaluation mode over the samples of all processes, on the same batches at
    every point: a task's loss counts by the samples of a batch that have a label (of an existing
    module by its ``"counts"``). An existing module returns its ``"losses"`` from ``training_step``,
    which runs on validation batches, too; ``second_pass`` is true there.

    It looks when a fit has ended, at the last parameters, and in ``trainer.validate`` and
    ``trainer.test``, at those that are loaded there. Nothing stays of it: parameters come back bit
    for bit, after an error too; buffers, metrics, logs and random streams are as before. A look
    takes a forward pass for each point and batch, in training steps nothing is done. Of several
    validation or test data loaders the first is looked at.

    Not supported: strategies other than one device or DDP, and existing modules with manual
    optimization.

    Args:
        dimensions: 1 or 2.
        radius: How far to go to both sides, in ``(0, inf)``; at 1 the perturbation of each filter
            is as long as the filter.
        points: Points of the grid along each axis, odd and at least 3, so that the centre is one of
            them; by default 41 in one dimension and 21 (441 in all) in two.
        batches: The most batches of each process to look at; ``None`` for all.
        data: Whether a fit looks at ``"val"`` or ``"train"`` data.
        biases: Whether parameters with one axis (biases, the scales of normalisation layers) move,
            too, each as one filter. In the published code of Li et al. they do not.
        runs: When to look: after a ``"fit"``, in ``"validate"``, in ``"test"``.
        every_n_epochs: Look after every n-th epoch of a fit, too, at least 1.
        seed: Seed of the private generator of the directions, at least 0.
        csv: A file with a row for every point and task: columns ``epoch``, ``step`` (optimizer
            steps done), ``run``, ``task``, ``x`` (in two dimensions ``x``, ``y``) and ``loss``. It
            is begun anew by a fit that does not resume; ``validate`` and ``test`` replace their own
            rows.
        png: A file to draw the latest look to; needs matplotlib.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.

    Example:
        >>> from lightning_flatmtl import TaskSAM
        >>> landscape = LossLandscape(dimensions=1, batches=4, csv="landscape.csv")
        >>> callbacks = [TaskSAM(), landscape]
    """

    def __init__(
        self,
        dimensions: int = 2,
        radius: float = 1.0,
        points: int | None = None,
        *,
        batches: int | None = 8,
        data: Literal["val", "train"] = "val",
        biases: bool = False,
        runs: Sequence[Run] = ("fit", "validate", "test"),
        every_n_epochs: int | None = None,
        seed: int = 0,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        if isinstance(dimensions, bool) or dimensions not in _POINTS:
            raise ValueError(f"`dimensions` must be 1 or 2, got {dimensions!r}.")
        if not is_positive(radius):
            raise ValueError(f"`radius` must be in (0, inf), got {radius!r}.")
        n = _POINTS[dimensions] if points is None else points
        if not isinstance(n, int) or isinstance(n, bool) or n < 3 or n % 2 == 0:
            raise ValueError(f"`points` must be an odd integer >= 3 or None, got {points!r}.")
        if data not in {"val", "train"}:
            raise ValueError(f"`data` must be 'val' or 'train', got {data!r}.")
        if not isinstance(biases, bool):
            raise ValueError(f"`biases` must be True or False, got {biases!r}.")
        self.dimensions = dimensions
        self.radius = float(radius)
        self.points = n
        self.biases = biases
        axes = ("x", "y")[:dimensions]
        self._columns = ("epoch", "step", "run", "task", *axes, "loss")
        super().__init__(runs, every_n_epochs, batches, data == "train", False, seed, csv, png)

    @property
    def axis(self) -> list[float]:
        """The points of the grid along an axis, 0 in the middle."""
        half = self.points // 2
        return [self.radius * (i - half) / half for i in range(self.points)]

    @override
    def _explore(self, explorer: Explorer, generator: torch.Generator) -> _Landscape:
        directions = [
            filter_normalised(explorer.origin, generator, self.biases)
            for _ in range(self.dimensions)
        ]
        points = list(product(self.axis, repeat=self.dimensions))
        losses: dict[str, list[float]] = {}
        for values in explorer.values(directions, points):
            for name, loss in values.items():
                losses.setdefault(name.removesuffix("/loss"), []).append(loss)
        return _Landscape(losses, points)

    @override
    def _figures(self, findings: _Landscape) -> dict[str, float]:
        ends = [
            i
            for i, point in enumerate(findings.points)
            if sorted(map(abs, point)) == [*[0.0] * (self.dimensions - 1), self.radius]
        ]
        figures = {}
        for task, losses in findings.losses.items():
            centre = losses[len(losses) // 2]
            figures[f"landscape/{task}/loss"] = centre
            rise = sum(losses[i] for i in ends) / len(ends) - centre
            figures[f"landscape/{task}/rise"] = rise
            figures[f"landscape/{task}/max_rise"] = (
                torch.tensor(losses, dtype=torch.float64).max().item() - centre
            )
        return figures

    @override
    def _rows(self, findings: _Landscape) -> list[list[object]]:
        return [
            [task, *point, loss]
            for task, losses in findings.losses.items()
            for point, loss in zip(findings.points, losses, strict=True)
        ]

    @override
    def _draw(self, findings: _Landscape, data: str, path: Path) -> None:
        draw = draw_curves if self.dimensions == 1 else draw_surfaces
        draw(findings.losses, self.axis, data, path)
