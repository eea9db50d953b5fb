"""NoiseRobustness: how losses and metrics hold when the weights are perturbed at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import final

import torch
from typing_extensions import override

from lightning_flatmtl.callbacks._directions import filter_normalised, on_sphere
from lightning_flatmtl.callbacks._evaluation import Explorer
from lightning_flatmtl.callbacks._noise_picture import draw_noise
from lightning_flatmtl.callbacks._survey import Run, Survey, checked_count, is_positive

__all__ = ["NoiseRobustness"]


@final
class NoiseRobustness(Survey[dict[str, list["_Held"]]]):
    r"""Logs each task's loss and metrics against the radius of random perturbations of the weights.

    With all trainable parameters :math:`\theta` (trunk and heads) as one vector of :math:`d`
    numbers, the value of a metric :math:`M` at radius :math:`r` is

    .. math::

        \frac1K \sum_{k=1}^K M(\theta + r\, u_k), \qquad
        u_k = \frac{z_k}{\lVert z_k \rVert}, \quad z_k \sim \mathcal N(0, I_d),

    so that :math:`r\,u_k` is uniformly distributed over the sphere of radius :math:`r` (Phan et
    al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_, Figure 4, :math:`K = 10`). The
    directions are the same at all radii, in all processes and whenever it looks. With
    ``relative=True`` each filter is perturbed by :math:`r` times its own norm instead, as in
    :class:`~lightning_flatmtl.callbacks.LossLandscape`: radii then mean the same for networks
    whose weights differ in scale, as those of layers before a normalisation may.

    ======================================= =======================================================
    logged                                  what it is
    ======================================= =======================================================
    ``noise/{task}/loss/radius_{r}``        the task's loss, the mean over the directions
    ``noise/{task}/{metric}/radius_{r}``    the same of each of its metrics
    ``..._std``                             its standard deviation over the directions
    ``noise/{task}/{metric}/relative_{r}``  the same with ``relative=True``
    ======================================= =======================================================

    Radius 0 stands for the parameters as they are. Metrics are those that ``validation_step`` (in a
    test ``test_step``) logs, under the same names without ``val/`` or ``test/``; of an existing
    module also the ``"losses"`` that its ``training_step`` returns on the same batches. What is
    logged otherwise than as a metric or as a mean over batches is left out. Losses and metrics are
    taken in evaluation mode over the samples of all processes: a batch counts by its samples, a
    task's loss by those that have a label (of an existing module by its ``"counts"``).

    It looks when a fit has ended, at the last parameters, and in ``trainer.validate`` and
    ``trainer.test``, at those that are loaded there. Nothing stays of it: parameters come back bit
    for bit, after an error too; buffers, metrics, logs and random streams are as before. A look
    takes ``directions * len(radii) + 1`` evaluations of the data; nothing is done in training
    steps. Of several validation or test data loaders the first is looked at.

    Not supported: strategies other than one device or DDP, and existing modules with manual
    optimization.

    Args:
        radii: The radii, different numbers in ``(0, inf)``. Choose them so that the largest one
            spoils the model: that depends on the number and scale of its weights.
        directions: How many random directions, at least 1.
        relative: Whether radii are measured by the norm of each filter. A bias, or any parameter
            with one axis, is one filter.
        batches: The most batches of each process to look at; ``None`` for all.
        runs: When to look: after a ``"fit"``, in ``"validate"``, in ``"test"``.
        every_n_epochs: Look after every n-th epoch of a fit, too, at least 1.
        seed: Seed of the private generator of the directions, at least 0.
        csv: A file to write to: columns ``epoch``, ``step`` (optimizer steps done), ``run``,
            ``task``, ``metric``, ``radius``, ``mean`` and ``std``. It is begun anew by a fit that
            does not resume; ``validate`` and ``test`` replace their own rows.
        png: A file to draw the latest look to; needs matplotlib.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.

    Example:
        >>> from lightning_flatmtl import TaskSAM
        >>> from lightning_flatmtl.aggregators import CAGrad
        >>> noise = NoiseRobustness(radii=(1.0, 2.0, 4.0), csv="noise.csv")
        >>> callbacks = [CAGrad(), TaskSAM(), noise]
    """

    _columns = ("epoch", "step", "run", "task", "metric", "radius", "mean", "std")

    def __init__(
        self,
        radii: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
        directions: int = 10,
        *,
        relative: bool = False,
        batches: int | None = None,
        runs: Sequence[Run] = ("fit", "validate", "test"),
        every_n_epochs: int | None = None,
        seed: int = 0,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        self.radii = _checked_radii(radii)
        self.directions = checked_count("directions", directions)
        if not isinstance(relative, bool):
            raise ValueError(f"`relative` must be True or False, got {relative!r}.")
        self.relative = relative
        super().__init__(runs, every_n_epochs, batches, False, True, seed, csv, png)

    @override
    def _explore(self, explorer: Explorer, generator: torch.Generator) -> dict[str, list["_Held"]]:
        samples: dict[str, dict[float, list[float]]] = {}
        for k in range(self.directions):
            if self.relative:
                direction = filter_normalised(explorer.origin, generator, vectors=True)
            else:
                direction = on_sphere(explorer.origin, generator)
            radii = self.radii if k else (0.0, *self.radii)
            for r, values in zip(
                radii, explorer.values([direction], [(r,) for r in radii]), strict=True
            ):
                for name, value in values.items():
                    samples.setdefault(name, {}).setdefault(r, []).append(value)
        return {
            name: [
                _Held(r, fmean(of_r), stdev(of_r) if len(of_r) > 1 else 0.0)
                for r, of_r in sorted(by_radius.items())
            ]
            for name, by_radius in sorted(samples.items(), key=_not_of_a_task)
        }

    @override
    def _figures(self, findings: dict[str, list["_Held"]]) -> dict[str, float]:
        radius = "relative" if self.relative else "radius"
        figures = {}
        for name, curve in findings.items():
            for held in curve:
                logged = f"noise/{name}/{radius}_{held.radius:g}"
                figures[logged] = held.mean
                if held.radius and self.directions > 1:
                    figures[f"{logged}_std"] = held.std
        return figures

    @override
    def _rows(self, findings: dict[str, list["_Held"]]) -> list[list[object]]:
        return [
            [*_split(name), held.radius, held.mean, held.std]
            for name, curve in findings.items()
            for held in curve
        ]

    @override
    def _draw(self, findings: dict[str, list["_Held"]], data: str, path: Path) -> None:
        by_metric: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
        for name, curve in findings.items():
            task, metric = _split(name)
            numbers = [(held.radius, held.mean, held.std) for held in curve]
            by_metric.setdefault(metric, {})[task] = numbers
        draw_noise(by_metric, data, self.directions, self.relative, path)


@dataclass(frozen=True)
class _Held:
    """What a value is at a radius."""

    radius: float
    mean: float
    std: float


def _split(name: str) -> tuple[str, str]:
    """Task and metric of a name; the task is empty where it has none."""
    task, slash, metric = name.partition("/")
    return (task, metric) if slash else ("", name)


def _not_of_a_task(item: tuple[str, object]) -> bool:
    return "/" not in item[0]


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    listed = list(radii) if isinstance(radii, Sequence) and not isinstance(radii, str) else []
    named = {f"{r:g}" for r in listed} if all(map(is_positive, listed)) else set()
    if not listed or len(named) != len(listed):
        raise ValueError(
            f"`radii` must be one or more different numbers in (0, inf), got {radii!r}."
        )
    return tuple(sorted(float(r) for r in listed))
