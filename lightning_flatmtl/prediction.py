"""One prediction for all tasks together, or none where it is not sure enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from lightning_flatmtl.functional.joint import most_likely_combinations

__all__ = ["JointLabels", "JointPrediction"]


@dataclass  # not frozen: Lightning moves its tensors to the host
class JointLabels:
    """The most likely combination of labels of every sample, of all tasks together."""

    labels: dict[str, Tensor]
    """Int64 ``[samples]`` by task, ``[samples, labels]`` of a multi-label task; with ``top`` above
    1 ``[samples, k]`` and ``[samples, k, labels]``, the most likely first."""
    log_probability: Tensor
    """Of the combination, float64 ``[samples]``, or ``[samples, k]``."""
    abstained: Tensor
    """Whether not even the most likely one reaches the threshold, bool ``[samples]``."""

    @property
    def probability(self) -> Tensor:
        """Of the combination, float64; of many tasks it may be too small for a float."""
        return self.log_probability.exp()

    @property
    def coverage(self) -> float:
        """The share of samples that are answered."""
        return 1 - float(self.abstained.double().mean())

    def correct(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Whether the most likely combination is right in every task.

        Args:
            targets: The true labels by task, for all tasks of this prediction.

        Returns:
            Bool ``[samples]``.

        Raises:
            ValueError: If a task has no target, or one of another shape.
        """
        right = torch.ones_like(self.abstained)
        for task, labels in self.labels.items():
            if task not in targets:
                raise ValueError(
                    f"`targets` must hold every task of the prediction, got none for '{task}'."
                )
            best = labels if self.log_probability.ndim == 1 else labels[:, 0]
            target = targets[task].to(best.device)
            if target.shape != best.shape:
                raise ValueError(
                    f"The target of '{task}' must have shape {list(best.shape)}, got "
                    f"{list(target.shape)}."
                )
            right &= (best == target) if best.ndim == 1 else (best == target).all(1)
        return right


class JointPrediction:
    r"""The product of the tasks' predictive distributions, and abstention below a confidence.

    For logits :math:`z_t` of the tasks the joint distribution is

    .. math::
        p(y_1, \dots, y_T \mid x) = \prod_t p_t(y_t \mid x)

    with softmax or sigmoid for :math:`p_t`: the labels are taken as **independent given the
    features**, which is what a shared encoder with a head for each task says. The prediction is the
    most likely combination, which are the most likely labels of the tasks; its probability tells
    how sure all of them are at once. Where that is below ``threshold`` there is no answer (Chow,
    1970, `doi:10.1109/TIT.1970.1054406 <https://doi.org/10.1109/TIT.1970.1054406>`_).

    Everything is computed from log-probabilities in float64, so that many tasks underflow nowhere.
    NaN is not sure of anything: it abstains.

    A task's logits are of one of three kinds:

    - multi-class, ``[samples, classes]``;
    - binary, ``[samples]`` or ``[samples, 1]``: one logit, of label 1;
    - multi-label, ``[samples, labels]``, for tasks named in ``multi_label``: a logit for each.

    Args:
        threshold: The smallest joint probability that is answered, in [0, 1]; 0 answers always.
        classes: The tasks that take part, with the number of their classes or labels (of a binary
            task 2), which their logits must have. By default all that are predicted, with any.
        multi_label: The tasks with several labels that go together.
        top: How many combinations, the most likely first, at least 1. Fewer if there are fewer.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> from lightning_flatmtl import JointPrediction
        >>> logits = {
        ...     "left": torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        ...     "odd": torch.tensor([3.0, -3.0]),
        ... }
        >>> joint = JointPrediction(threshold=0.8)(logits)
        >>> joint.labels
        {'left': tensor([0, 0]), 'odd': tensor([1, 0])}
        >>> joint.probability.round(decimals=3), joint.abstained
        (tensor([0.9190, 0.5490], dtype=torch.float64), tensor([False,  True]))
    """

    def __init__(
        self,
        threshold: float = 0.5,
        classes: dict[str, int] | None = None,
        multi_label: Sequence[str] = (),
        top: int = 1,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {threshold}.")
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        if classes is not None:
            small = {task: n for task, n in classes.items() if n < 1}
            if not classes or small:
                raise ValueError(
                    "`classes` must give at least one task and at least 1 class each, got "
                    f"{classes}."
                )
        self.threshold, self.top = threshold, top
        self.classes = None if classes is None else dict(classes)
        self.multi_label = tuple(multi_label)

    def __call__(self, predictions: Any) -> JointLabels:
        """Join the predictions of a batch, or of all batches.

        Args:
            predictions: Logits by task, as ``predict_step`` returns them, or a list of such, as
                ``Trainer.predict`` does. A task that is absent, or ``None``, is left out of the
                product.

        Raises:
            ValueError: If there is no task, no batch, or logits of a shape that fits no kind.
            TypeError: If it is neither a mapping nor a list of such.
        """
        if isinstance(predictions, Sequence):
            return self._joined(predictions)
        if not isinstance(predictions, Mapping):
            raise TypeError(
                "`predictions` must be logits by task, or a list of such, got "
                f"{type(predictions).__name__}."
            )
        logits = self._taking_part(predictions)
        factors: list[Tensor] = []
        ends: dict[str, int] = {}
        for task, values in logits.items():
            factors += self._factors(task, values)
            ends[task] = len(factors)
        samples = {task: len(values) for task, values in logits.items()}
        if len(set(samples.values())) > 1:
            raise ValueError(f"All tasks must have the same samples, got {samples}.")
        logs, options = most_likely_combinations(factors, self.top)
        labels, begin = {}, 0
        for task, end in ends.items():
            own = options[:, :, begin:end]
            labels[task] = own if task in self.multi_label else own[:, :, 0]
            begin = end
        floor = math.log(self.threshold) if self.threshold > 0 else -math.inf
        abstained = ~(logs[:, 0] >= floor)  # NaN compares with nothing
        if self.top == 1:
            return JointLabels({t: y[:, 0] for t, y in labels.items()}, logs[:, 0], abstained)
        return JointLabels(labels, logs, abstained)

    def _joined(self, batches: Sequence[Any]) -> JointLabels:
        if batches and isinstance(batches[0], Sequence):
            raise TypeError(
                "`predictions` must be the batches of one data loader, got those of "
                f"{len(batches)}. Join each by itself: `[joint(of_loader) for of_loader in ...]`."
            )
        found = [self(batch) for batch in batches]
        if not found:
            raise ValueError("`predictions` must hold at least one batch, got none.")
        tasks = list(found[0].labels)
        if any(list(part.labels) != tasks for part in found):
            raise ValueError(
                "All batches must have the same tasks, got different ones. Join batch by batch."
            )
        return JointLabels(
            {task: torch.cat([part.labels[task] for part in found]) for task in tasks},
            torch.cat([part.log_probability for part in found]),
            torch.cat([part.abstained for part in found]),
        )

    def _taking_part(self, predictions: Mapping[str, Any]) -> dict[str, Tensor]:
        wanted: Iterable[str] = predictions if self.classes is None else self.classes
        found = {task: predictions[task] for task in wanted if predictions.get(task) is not None}
        if not found:
            raise ValueError(
                f"`predictions` must hold logits of at least one task, got {list(predictions)}"
                + ("." if self.classes is None else f", none of {list(self.classes)}.")
            )
        return found

    def _factors(self, task: str, logits: Any) -> list[Tensor]:
        """The log-probabilities of a task's labels, each ``[samples, options]``."""
        several = task in self.multi_label
        if not isinstance(logits, Tensor) or not 1 <= logits.ndim <= 2 or 0 in logits.shape[1:]:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The logits of '{task}' must have shape [samples, classes] or [samples], got "
                f"{got}. Leave a task without classes out: `classes` names those that take part."
            )
        if not logits.is_floating_point():
            raise ValueError(
                f"The logits of '{task}' must be floating-point numbers, got {logits.dtype}."
            )
        table = logits.detach().double()
        table = table[:, None] if table.ndim == 1 else table
        options = 2 if not several and table.shape[1] == 1 else table.shape[1]
        if self.classes is not None and self.classes[task] != options:
            raise ValueError(
                f"The logits of '{task}' must be of {self.classes[task]} classes, got shape "
                f"{list(logits.shape)}."
            )
        if several or table.shape[1] == 1:
            return [torch.stack([logsigmoid(-z), logsigmoid(z)], dim=1) for z in table.unbind(1)]
        return [log_softmax(table, dim=1)]
