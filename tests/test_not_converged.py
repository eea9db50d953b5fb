"""Solves that stop at their limit are counted in the log."""

import pytest

from lightning_flatmtl.aggregators import NashMTL
from lightning_flatmtl.functional import _barrier
from tests.helpers import fit
from tests.hosts import HOSTS


@pytest.mark.filterwarnings("ignore::lightning_flatmtl.functional.ConvergenceWarning")
@pytest.mark.parametrize("host", HOSTS)
def test_solves_that_stop_at_their_limit_are_counted(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "train/not_converged" not in fit(HOSTS[host](), [NashMTL()]).callback_metrics
    monkeypatch.setattr(_barrier, "_MAX_STEPS", 0)
    done = fit(HOSTS[host](), [NashMTL()], max_epochs=2)
    assert done.callback_metrics["train/not_converged"] == 3  # batches of an epoch
