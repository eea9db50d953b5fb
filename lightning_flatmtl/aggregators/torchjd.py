"""Aggregators of TorchJD as callbacks."""

import copy
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.engine import TaskGradients

__all__ = ["TorchJD"]


@final
class TorchJD(Aggregator):
    r"""Any aggregator of `TorchJD <https://torchjd.org>`_ as a callback.

    ``TorchJD(torchjd.aggregation.UPGrad())`` computes with TorchJD's own solver, conventions and
    tolerances. Loss part and flat part are given a copy of the aggregator each, so that one with a
    state keeps two; what it declares in its ``state_dict`` is saved with the run, nothing else.

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

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        with torch.no_grad(), torch.autocast(gradients.jacobian.device.type, enabled=False):
            direction: Tensor = self._of_part[gradients.part](gradients.jacobian)
        return direction.detach()

    @override
    def get_state(self) -> dict[str, Any]:
        states = {part: theirs.state_dict() for part, theirs in self._of_part.items()}
        return states if any(states.values()) else {}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        for part, theirs in self._of_part.items():
            for name, value in state[part].items():
                # Some make their buffers in the first call; what is not there cannot be loaded.
                owner, _, buffer = name.rpartition(".")
                theirs.get_submodule(owner)._buffers[buffer] = value.clone()
            theirs.load_state_dict(state[part])
