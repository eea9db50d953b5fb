"""Methods of TorchJD as callbacks."""

import copy
from importlib.util import find_spec
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._losses import given
from lightning_flatmtl.aggregators._torchjd_kinds import kind_of
from lightning_flatmtl.aggregators._torchjd_state import TorchJDState
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.aggregation import Requires
from lightning_flatmtl.engine.gradients.combination import weighted_rows

__all__ = ["TorchJD"]


@final
class TorchJD(Aggregator):
    r"""Any aggregator, weighting or scalarizer of `TorchJD <https://torchjd.org>`_ as a callback.

    ``TorchJD(torchjd.aggregation.UPGrad())`` computes with TorchJD's own solver, conventions and
    tolerances, on the matrix of the task gradients. ``TorchJD(UPGradWeighting())`` sees the Gramian
    only, in float64, and so needs neither the matrix nor, on several processes, the others'
    columns. ``TorchJD(torchjd.scalarization.GeometricMean())`` weighs the losses, heads included,
    by the derivatives of the scalarized loss, and costs one backward pass.

    Loss part and flat part are given a copy each, so that a method with a state keeps two. What its
    ``reset`` forgets is saved with the run and restored, as long as it is made of tensors and
    numbers; that of TorchJD's ``NashMTL`` is not, so it starts afresh with a warning. Random
    numbers are those of the global generator, as in TorchJD. A scalarizer's ``step`` is called when
    an epoch ends (``DWA``).

    Args:
        aggregator: An instance of a class of ``torchjd.aggregation`` or ``torchjd.scalarization``.

    Raises:
        ModuleNotFoundError: If TorchJD is not installed.
        TypeError: If ``aggregator`` is not one of TorchJD's.
        ValueError: If it needs more than gradients or losses of a batch: parameters of its own
            (``UW``, ``IMTLL``, ``FAMO``) or a second batch (``MoDoWeighting``,
            ``SDMGradWeighting``); or if a scalarizer is given no losses.
    """

    def __init__(self, aggregator: nn.Module) -> None:
        if find_spec("torchjd") is None:
            raise ModuleNotFoundError(
                'TorchJD is not installed: run `pip install "lightning-flatmtl[torchjd]"`.'
            )
        self._kind = kind_of(aggregator)
        self.aggregator = aggregator
        self._of_part = {"loss": aggregator, "flat": copy.deepcopy(aggregator)}
        self._states = {part: TorchJDState(theirs) for part, theirs in self._of_part.items()}

    @property
    @override
    def needs_gradients(self) -> bool:
        return self._kind.needs_gradients

    @property
    @override
    def weighs_losses(self) -> bool:
        return self._kind.weighs_losses

    @property
    @override
    def requires(self) -> Requires:
        return self._kind.requires

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        if not self.weighs_losses:
            return None
        self._states["loss"].meet(torch.device("cpu"))
        return self._kind.loss_weights(self._of_part["loss"], given(self, losses))

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor | None:
        seen = gradients.jacobian if self.requires == "matrix" else gradients.gram
        self._states[gradients.part].meet(seen.device)
        return self._kind.row_weights(self._of_part[gradients.part], gradients)

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        weights = self.row_weights(gradients)
        if weights is not None:
            return weighted_rows(weights, gradients, self)
        return self._kind.direction(self._of_part[gradients.part], gradients)

    def end_epoch(self) -> None:
        """Close an epoch of a scalarizer that counts them; a Trainer does this."""
        step = getattr(self.aggregator, "step", None)
        if self.weighs_losses and step is not None:
            step()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.end_epoch()

    @override
    def reset(self) -> None:
        super().reset()
        for state in self._states.values():
            state.reset()

    @override
    def get_state(self) -> dict[str, Any]:
        return {part: state.get() for part, state in self._states.items() if state.exists}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        for part, own in self._states.items():
            own.set(state[part])
