"""Gates: how much of each expert a task takes, for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatmtl.models._factory import ModuleFactory, made

__all__ = ["Gate", "mixed", "refuse_unclear_gate"]


def refuse_unclear_gate(features: Any, gate: ModuleFactory | None) -> None:
    """Refuse a gate that is said in no way, or in two.

    Raises:
        ValueError: If both or neither is given.
    """
    if (features is None) == (gate is None):
        got = "neither" if gate is None else "both"
        raise ValueError(
            f"One of `gate_features` and `gate` must be given, got {got}. `gate_features` is the "
            "number of inputs of a linear gate; `gate` makes a gate of your own."
        )


class Gate(nn.Module):
    """Weights of experts by sample: the softmax of a logit for each.

    Args:
        experts: How many there are.
        features: Inputs of a linear gate without bias; ``None`` with ``gate``.
        gate: Makes a module from inputs to ``[batch, experts]``; ``None`` for the linear gate.
    """

    def __init__(self, experts: int, features: int | None, gate: ModuleFactory | None) -> None:
        super().__init__()
        if features is not None and features < 1:
            raise ValueError(f"`gate_features` must be at least 1, got {features}.")
        self.experts, self.features = experts, features
        own = features is None
        self.logits = (
            made("gate", gate) if own and gate else nn.Linear(features or 1, experts, False)
        )

    def forward(self, inputs: Any) -> Tensor:
        """Weights ``[batch, experts]``; those of a sample sum up to 1."""
        if self.features is not None:
            inputs = self._flat(inputs)
        logits = self.logits(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.experts:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"`gate` must map to a logit for each expert, [batch, {self.experts}], got {got}."
            )
        return logits.softmax(1)

    def _flat(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"`gate_features` is for a gate that reads a tensor, got {type(inputs).__name__}. "
                "Make a tensor of the inputs in `stem`, or pass `gate`, which reads them as they "
                "are."
            )
        flat = inputs.flatten(1)
        if flat.shape[1] != self.features:
            raise ValueError(
                f"`gate_features` must be the number of values of a sample, {flat.shape[1]} in "
                f"{list(inputs.shape)}, got {self.features}."
            )
        return flat


def mixed(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The sum of the experts' outputs, weighted by sample.

    Args:
        weights: Shape ``[batch, experts]``.
        outputs: ``[batch, ...]`` for each expert.

    Raises:
        ValueError: If the experts' outputs differ in shape.
    """
    shapes = list(dict.fromkeys(tuple(output.shape) for output in outputs))
    if len(shapes) > 1:
        raise ValueError(
            f"All experts must have outputs of one shape, got {list(shapes[0])} and "
            f"{list(shapes[1])}."
        )
    stacked = torch.stack(list(outputs), 1)
    return (weights.reshape(*weights.shape, *[1] * (stacked.ndim - 2)) * stacked).sum(1)
