"""The area under the ROC curve of a binary task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_flatmtl.functional.auroc import auroc

__all__ = ["LogitAUROC"]


class LogitAUROC(Metric):
    """Area under the ROC curve of binary logits, over all samples of the epoch.

    :func:`lightning_flatmtl.functional.auroc` has the formula. It is the value of torchmetrics'
    ``BinaryAUROC`` without thresholds, which cannot take logits safely: a batch whose logits happen
    to lie within [0, 1] is taken for probabilities there and ranked against the sigmoid of the
    other batches. All logits are kept, 16 bytes a sample.

    Logits and targets are ``[n]`` or of any other common shape; targets are 0 or 1, of any type.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import LogitAUROC
        >>> metric = LogitAUROC()
        >>> metric(torch.tensor([-2.0, 0.3, 0.1, 4.0]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        # What a process without samples brings to the others is of this type; so is all else.
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Raises:
            ValueError: If the shapes differ.
        """
        if preds.shape != target.shape:
            raise ValueError(
                "`preds` must be binary logits of the shape of the targets, got "
                f"{list(preds.shape)} and {list(target.shape)}."
            )
        self.logits.append(preds.detach().flatten().double())
        self.labels.append((target.flatten() == 1).double())

    def compute(self) -> Tensor:
        """The area over all samples, NaN if a class has none."""
        if isinstance(self.logits, list) and not self.logits:  # a tensor once processes have met
            return torch.full((), torch.nan, dtype=torch.float64, device=self.device)
        return auroc(dim_zero_cat(self.logits), dim_zero_cat(self.labels))
