"""What Calibration adds up for a task on a data set, and what it makes of the sums."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.callbacks._classification import Kind, Labelled
from lightning_flatmtl.metrics import BrierScore, ExpectedCalibrationError, PredictiveEntropy

__all__ = ["Finding", "Sums", "add_up", "entropy_sums", "everyones"]

M = TypeVar("M", bound=Metric)


@dataclass(frozen=True)
class Finding:
    """The figures of a task on a data set; numbers only, so that it can be kept.

    Args:
        task: Its name.
        kind: What classification it is.
        classes: The number of its classes.
        figures: ``ece``, ``brier``, ``entropy`` and, if there is data out of domain,
            ``ood_entropy``.
        bins: By bin: samples, mean confidence and share of outcomes, the latter two NaN where
            there is no sample.
        entropies: By bin from 0 to the logarithm of the number of classes: samples.
        ood_entropies: The same out of domain; empty without such data.
    """

    task: str
    kind: Kind
    classes: int
    figures: dict[str, float]
    bins: list[tuple[float, float, float]]
    entropies: list[float]
    ood_entropies: list[float]

    def rows(self) -> Iterator[tuple[str, int | str, float]]:
        """Name, bin and value of every figure; the bin of those that have none is empty."""
        for name, value in self.figures.items():
            yield name, "", value
        for i, (count, confidence, accuracy) in enumerate(self.bins):
            yield "count", i, count
            if count:
                yield "confidence", i, confidence
                yield "accuracy", i, accuracy


class Sums:
    """The sums of a task on a data set.

    Args:
        kind: What classification it is.
        classes: The number of its classes.
        n_bins: The number of bins of the confidence.
        device: Where the predictions are.
    """

    def __init__(self, kind: Kind, classes: int, n_bins: int, device: torch.device) -> None:
        self.kind, self.classes = kind, classes
        self.error = _on(device, ExpectedCalibrationError(n_bins, sync_on_compute=False))
        self.brier = _on(device, BrierScore(sync_on_compute=False))
        self.entropy = entropy_sums(device)
        self.probabilities = True
        """Whether every batch so far had distributions in the place of logits."""

    def update(self, batch: Labelled) -> None:
        """Add the samples of a batch."""
        if not len(batch.logits):
            return
        self.probabilities = self.probabilities and batch.has_probabilities()
        device = self.error.device
        logits, target = batch.logits.detach().to(device), batch.target.to(device)
        for metric in self.metrics:
            metric.update(logits, target)

    @property
    def metrics(self) -> list[Metric]:
        """All metrics."""
        return [self.error, self.brier, self.entropy]

    @property
    def count(self) -> int:
        """The number of samples."""
        return int(self.brier.count)

    def finding(self, task: str, ood: PredictiveEntropy | None) -> Finding:
        """The figures."""
        figures = {"ece": self.error, "brier": self.brier, "entropy": self.entropy}
        values = {name: float(metric.compute()) for name, metric in figures.items()}
        if ood is not None:
            values["ood_entropy"] = float(ood.compute())
        counts, confidences, outcomes = self.error.bins
        bins = torch.stack([counts, confidences / counts, outcomes / counts], 1).tolist()
        return Finding(
            task,
            self.kind,
            self.classes,
            values,
            [tuple(row) for row in bins],
            self.entropy.histogram.tolist(),
            [] if ood is None else ood.histogram.tolist(),
        )


def entropy_sums(device: torch.device) -> PredictiveEntropy:
    """The sums of the entropy out of domain."""
    return _on(device, PredictiveEntropy(sync_on_compute=False))


def everyones(trainer: Trainer, value: Any) -> list[Any]:
    """What every process gives, by rank; small things that can be pickled."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def add_up(trainer: Trainer, metrics: Sequence[Metric]) -> None:
    """Let the sums of all processes be added up: one exchange for all metrics."""
    if trainer.world_size == 1 or not metrics:
        return
    states = [value for metric in metrics for value in _states(metric)]
    total = trainer.strategy.reduce(_joined(states), reduce_op="sum")
    assert isinstance(total, Tensor)
    parts = iter(torch.split(total, [state.numel() for state in states]))
    for state in states:
        state.copy_(next(parts).view_as(state))


def _states(metric: Metric) -> Iterable[Tensor]:
    return [value for value in metric.metric_state.values() if isinstance(value, Tensor)]


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _on(device: torch.device, metric: M) -> M:
    """A metric where there is float64, which has a value (NaN) before it has samples."""
    made: M = metric.to("cpu" if device.type == "mps" else device)
    nothing = torch.zeros(0, device=made.device)
    made.update(nothing, nothing)
    return made
