"""The task Jacobian at the encoder's output: one backward pass of the trunk for all tasks."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.parameters.blocks import GraphBlocks, Setting, unscaled
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.partition import reached_parameters
from lightning_flatmtl.engine.processes.base import LocalRows, RowSums

__all__ = ["FeatureBlocks"]


@final
class FeatureBlocks(GraphBlocks):
    """The features in the place of the shared parameters.

    The rows are the tasks' gradients with respect to the features of the batch, ``d`` is their
    number of entries. The aggregated row is sent through the trunk in one backward pass. This is
    MGDA-UB's approximation, LibMTL's ``rep_grad``: cheap for many tasks, and the same as the exact
    method only where the aggregation is linear. Several processes have the columns of their own
    samples, and only the Gram matrix is summed.

    Args:
        setting: What is known of the step.
        features: The encoder's output with its graph; ``None`` in a process whose batch has no
            task, which has no columns then.

    Raises:
        ValueError: If a shared parameter lies behind the features, where it would be missed.
    """

    keep_graph = True
    of_samples = True

    def __init__(self, setting: Setting, features: Sequence[Tensor] | None) -> None:
        super().__init__(setting)
        if features is None:
            trunk: set[Tensor] = set(self.shared.params)
            shared = self.shared
            features = [torch.zeros(0, dtype=shared.dtype, device=shared.device)]
        else:
            trunk = self._before(features)
        # What only absent tasks reach rests, as in a process without features.
        rests = set(setting.partition.untouched(setting.trainable, self.tasks))
        self._trunk = [p for p in setting.trainable if p in trunk and p not in rests]
        self._features = list(features)
        self.shared = FlatParameters(self._features)
        self.heads = {
            task: FlatParameters([p for p in head.params if p not in trunk])
            for task, head in self.heads.items()
        }

    def _before(self, features: Sequence[Tensor]) -> set[Tensor]:
        """The leaves that the features depend on."""
        if not features:
            raise ValueError(
                "With `gradients='features'` the features must depend on a trainable parameter, "
                "got features without a graph. Unfreeze the encoder or use "
                "`gradients='parameters'`."
            )
        trunk = reached_parameters(features)
        behind = [p for p in self.shared.params if p not in trunk]
        if behind:
            shapes = [list(p.shape) for p in behind]
            raise ValueError(
                "With `gradients='features'` every shared parameter must lie before the features, "
                f"got {len(behind)} behind them, of shapes {shapes}. Move them into the encoder or "
                "use `gradients='parameters'`."
            )
        return trunk

    @property
    @override
    def width(self) -> int:
        return self.shared.numel

    @override
    def row_sums(self, rows: Tensor, here: bool = False) -> RowSums:
        # Every process has features of its own: columns that no other has.
        return LocalRows(rows)

    @override
    def shared_gradients(
        self, direction: Tensor, reached: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        if not self.width:
            return list(self._trunk), [torch.zeros_like(p) for p in self._trunk]
        views = zip(self.shared.views(direction[: self.shared.numel]), self._features, strict=True)
        scale = self._setting.scale
        # The trunk's backward pass needs the loss scale as much as that of the heads.
        scaled = ((v if scale is None else v * scale, features) for v, features in views)
        pulls = [view.to(features.dtype) for view, features in scaled]
        with outside_autocast(direction.device):
            gradients = torch.autograd.grad(self._features, self._trunk, pulls, allow_unused=True)
        return list(self._trunk), list(unscaled(gradients, scale))
