"""Aggregators of TorchJD as callbacks."""

import copy
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._torchjd_state import TorchJDState
from lightning_flatmtl.engine import TaskGradients

__all__ = ["TorchJD"]


@final
class TorchJD(Aggregator):
    r"""Any aggregator of `TorchJD <https://torchjd.org>`_ as a callback.

    ``TorchJD(torchjd.aggregation.UPGrad())`` computes with TorchJD's own solver, conventions and
    tolerances. Loss part and flat part are given a copy of the aggregator each, so that one with a
    state keeps two. What its ``reset`` forgets is saved with the run and restored, as long as it is
    made of tensors and numbers; that of TorchJD's ``NashMTL`` is not, so it starts afresh with a
    warning. Random numbers are those of the global generator, as in TorchJD.

    Args:
        aggregator: An instance of a class of ``torchjd.aggregation``.

    Raises:
        ModuleNotFoundError: If TorchJD is not installed.
        TypeError: If ``aggregator`` is not one of TorchJD's.
    """

    def __init__(self, aggregator: nn.Module) -> None:
        if find_spec("torchjd") is None:
            raise ModuleNotFoundError(
                'TorchJD is not installed: run `pip install "lightning-flatmtl[torchjd]"`.'
            )
        from torchjd.aggregation import Aggregator as Theirs  # noqa: PLC0415

        if not isinstance(aggregator, Theirs):
            raise TypeError(
                "`aggregator` must be an aggregator of torchjd.aggregation, got "
                f"{type(aggregator).__name__}."
            )
        self.aggregator = aggregator
        self._of_part = {"loss": aggregator, "flat": copy.deepcopy(aggregator)}
        self._states = {part: TorchJDState(theirs) for part, theirs in self._of_part.items()}

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        jacobian = gradients.jacobian
        self._states[gradients.part].meet(jacobian.device)
        with torch.no_grad(), torch.autocast(jacobian.device.type, enabled=False):
            direction: Tensor = self._of_part[gradients.part](jacobian)
        return direction.detach()

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
