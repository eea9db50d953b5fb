"""What Lightning does around a step, for both hosts: the same as without us, and active.

A MultiTaskModule without a method, and with a method that looks at the losses alone, is compared
with plain Lightning in ``test_parity.py``. Here it takes the path of the task gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision

from lightning_flatmtl.aggregators import CAGrad
from tests.features import (
    BATCHES,
    HOSTS,
    SUMS,
    Existing,
    Steps,
    active,
    assert_same_run,
    assert_trained,
    loader,
    run,
)
from tests.helpers import fit, module
from tests.test_parity import (
    Recorder,
    SkipsTheRest,
    Watcher,
    adam,
    every_other_epoch,
    groups,
    onecycle,
    plateau,
    plateau_outer_monitor,
    plateau_steps,
    rates,
    two_schedulers,
)


def real_fp16() -> dict[str, Any]:
    """A real loss scale on the CPU, where Lightning would take bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def few_eps(dtype: torch.dtype) -> float:
    """What ten steps make of gradients that are rounded once per task and not once.

    Measured: 3.8e-3 (bf16-mixed), 1.6e-2 (bf16-true, the weights are rounded too), 8.5e-4 (fp16).
    """
    return 8 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Row:
    """One feature: how it is switched on, and how near plain Lightning the sum then is."""

    settings: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    configure: Callable[[Any], Any] | None = None
    mixin: type = object
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12

    def run(self, host: str, callbacks: list[pl.Callback]) -> pl.Trainer:
        settings = self.settings() if callable(self.settings) else self.settings
        return run(host, callbacks, self.configure, self.mixin, self.dtype, **settings)


ROWS = {
    "nothing": Row(),
    "clip norm": Row({"gradient_clip_val": 0.1}),
    "clip value": Row({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate 2": Row({"accumulate_grad_batches": 2}),
    "accumulate 3": Row({"accumulate_grad_batches": 3}),  # the last group of 5 batches is short
    "accumulate and clip": Row({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "OneCycleLR": Row({"max_epochs": 4}, onecycle),
    "OneCycleLR, accumulate": Row({"max_epochs": 4, "accumulate_grad_batches": 2}, onecycle),
    "StepLR": Row({"max_epochs": 4}, every_other_epoch),
    "ReduceLROnPlateau": Row({"max_epochs": 4}, plateau),
    "plateau, train loss": Row({"max_epochs": 4}, plateau_outer_monitor),
    "plateau, steps": Row({"max_epochs": 4, "val_check_interval": 2}, plateau_steps),
    "two schedulers": Row({"max_epochs": 4}, two_schedulers),
    "parameter groups": Row(configure=groups),
    "AdamW": Row(configure=adam, tolerance=1e-10),
    "64-true": Row({"precision": "64-true"}, dtype=torch.float32),
    "32-true": Row(dtype=torch.float32, tolerance=1e-5),
    "bf16-mixed": Row(
        {"precision": "bf16-mixed"}, dtype=torch.float32, tolerance=few_eps(torch.bfloat16)
    ),
    "bf16-true": Row(
        {"precision": "bf16-true"}, dtype=torch.float32, tolerance=few_eps(torch.bfloat16)
    ),
    "16-mixed": Row(real_fp16, dtype=torch.float32, tolerance=few_eps(torch.float16)),
    "16-mixed, clip and accumulate": Row(
        lambda: {**real_fp16(), "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        dtype=torch.float32,
        tolerance=few_eps(torch.float16),
    ),
    "max_steps": Row({"max_steps": 7, "max_epochs": -1}),
    "max_steps, accumulate": Row({"max_steps": 4, "max_epochs": -1, "accumulate_grad_batches": 2}),
    "overfit_batches": Row({"overfit_batches": 2}),
    "limit_train_batches": Row({"limit_train_batches": 3, "accumulate_grad_batches": 2}),
    "limit_val_batches": Row({"limit_val_batches": 1}),
    "val_check_interval": Row({"val_check_interval": 2}),
    "fast_dev_run": Row({"fast_dev_run": True}),
    "barebones": Row(
        {
            "barebones": True,
            "logger": None,
            "enable_checkpointing": None,
            "enable_progress_bar": None,
            "enable_model_summary": None,
            "num_sanity_val_steps": None,
        }
    ),
    "detect_anomaly": Row({"detect_anomaly": True}),
    "skipped batches": Row({"accumulate_grad_batches": 2}, mixin=SkipsTheRest),
    "overridden hooks": Row(mixin=Recorder),
    "overridden hooks, accumulate": Row({"accumulate_grad_batches": 2}, mixin=Recorder),
}

rows = pytest.mark.parametrize("row", ROWS)
lightnings_advice = [
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
]
pytestmark = lightnings_advice

@cache
def plain_run(row: str) -> pl.Trainer:
    return ROWS[row].run("take-over", [])


PATHS = [("take-over", "losses"), ("take-over", "gradients"), ("module", "gradients")]


@rows
@pytest.mark.parametrize(("host", "path"), PATHS)
def test_the_sum_is_plain_lightning(row: str, host: str, path: str) -> None:
    ours = ROWS[row].run(host, SUMS[path]())
    assert_same_run(ours, plain_run(row), ROWS[row].tolerance)


@rows
@pytest.mark.parametrize("host", HOSTS)
def test_a_method_trains(row: str, host: str) -> None:
    ours = ROWS[row].run(host, active())
    plain = plain_run(row)
    assert_trained(ours)
    assert ours.global_step == plain.global_step
    assert ours.current_epoch == plain.current_epoch
    assert ours.callback_metrics.keys() == plain.callback_metrics.keys()
