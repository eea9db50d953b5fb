"""What a fit has borrowed is given back, after an error too."""

from typing import Any

import pytest

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.takeover import host_of
from tests.helpers import fit
from tests.hosts import HOSTS, Steps


class Stops(Steps):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self._error = error
        self.engine: Any = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.engine = host_of(pl_module).engine
        assert self.engine._workspace._buffers
        if batch_idx == 1:
            raise self._error


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_the_matrices_are_freed_after_an_error(host: str, error: type[BaseException]) -> None:
    model = HOSTS[host]()
    stops = Stops(error)
    with pytest.raises((error, SystemExit)):
        fit(model, [CAGrad(), TaskSAM(0.05), stops])
    assert "training_step" not in vars(model)
    engine = getattr(model, "engine", None)
    assert engine is None or not engine._workspace._buffers
    assert host == "taken over" or engine is not stops.engine
