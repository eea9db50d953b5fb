"""Semantic segmentation: the loss over the pixels that have a class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["segmentation_loss"]


def segmentation_loss(logits: Tensor, target: Tensor, ignore_index: int = -1) -> Tensor:
    r"""Cross-entropy over the labelled pixels.

    .. math::
        L = -\frac{1}{|V|} \sum_{x \in V} \log \mathrm{softmax}(z_x)_{y_x},
        \qquad V = \{x : y_x \ne \text{ignored}\}

    The mean of PyTorch's ``cross_entropy``, and of the published negative log-likelihood on
    log-softmax outputs. Without any labelled pixel those are NaN; this is 0 with a gradient of 0.

    Args:
        logits: ``[n, classes, ...]``.
        target: Classes, int64 ``[n, ...]``.
        ignore_index: The value of pixels that have no label.

    Returns:
        A scalar, in float32 at least.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 1, 2)
        >>> segmentation_loss(logits, torch.tensor([[[2, -1]]]))  # ln 4
        tensor(1.3863)
        >>> segmentation_loss(logits, torch.tensor([[[-1, -1]]]))
        tensor(0.)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp(min=1)
