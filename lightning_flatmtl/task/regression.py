"""A number, or several, for every sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, smooth_l1_loss
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_flatmtl.metrics.regression_error import RegressionError
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._entries import filled, mean_by_sample

__all__ = ["RegressionTask"]

_LOSSES = {"mse": mse_loss, "l1": l1_loss, "huber": smooth_l1_loss}


class RegressionTask(Task):
    r"""A regression: a linear head to a number or several, squared error, MAE and RMSE.

    Predictions and targets are ``[n]``, or ``[n, outputs]`` with ``outputs``. The loss is the mean
    over the samples of the mean over a sample's entries. Targets of very different scales than 1
    are better standardised, so that the task's loss is of the size of the others'.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of the encoder's features.
        outputs: Numbers of a sample, at least 1; ``None`` for one, without an axis of its own.
        loss: ``"mse"``, squared error; ``"l1"``, absolute error; ``"huber"``, half the squared
            error below 1 and the absolute one less a half beyond.
        missing: How a missing entry of a target looks, such as NaN; it counts neither in the loss
            nor in the metrics. A sample without any is left out as a whole. ``None`` if every entry
            is there.
        metrics: Metrics by name; by default ``mae`` and ``rmse``,
            :class:`~lightning_flatmtl.metrics.RegressionError`.

    Raises:
        ValueError: If ``outputs`` is below 1 or the loss is not known.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.task import RegressionTask
        >>> task = RegressionTask("age", in_features=64, missing=float("nan"))
        >>> task.head(torch.zeros(5, 64)).shape, sorted(task.metrics)
        (torch.Size([5]), ['mae', 'rmse'])
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        outputs: int | None = None,
        loss: Literal["mse", "l1", "huber"] = "mse",
        missing: float | None = None,
        metrics: dict[str, Metric] | MetricCollection | None = None,
    ) -> None:
        if outputs is not None and outputs < 1:
            raise ValueError(f"`outputs` must be at least 1, got {outputs}.")
        if loss not in _LOSSES:
            raise ValueError(f"`loss` must be 'mse', 'l1' or 'huber', got {loss!r}.")
        one = nn.Sequential(nn.Linear(in_features, 1), nn.Flatten(0))
        given = {"mae": RegressionError(False, missing), "rmse": RegressionError(True, missing)}
        super().__init__(
            name,
            head=one if outputs is None else nn.Linear(in_features, outputs),
            loss=_Loss(loss, missing),
            metrics=dict(given) if metrics is None else metrics,
            missing=missing,
        )


class _Loss(nn.Module):
    """An error of the labelled entries."""

    def __init__(self, kind: str, missing: float | None) -> None:
        super().__init__()
        self.kind, self.missing = kind, missing

    @override
    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        if predictions.shape != target.shape:  # torch would broadcast [n] and [n, 1] to [n, n]
            raise ValueError(
                "Targets of a regression must have the shape of the predictions, got "
                f"{list(target.shape)} and {list(predictions.shape)}."
            )
        target, there = filled(target, self.missing)
        losses = _LOSSES[self.kind](predictions, target.to(predictions.dtype), reduction="none")
        return mean_by_sample(losses, there)
