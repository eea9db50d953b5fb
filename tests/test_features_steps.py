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

from tests.features import (
    BATCHES,
    HOSTS,
    SUMS,
    active,
    assert_same_run,
    assert_trained,
    run,
)
from tests.helpers import sgd
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
    two_schedulers,
)


def real_fp16(scale: float = 2.0**10) -> dict[str, Any]:
    """A real loss scale on the CPU, where Lightning would take bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
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
    "16-mixed, overflow": Row(
        lambda: real_fp16(2.0**18), dtype=torch.float32, tolerance=few_eps(torch.float16)
    ),
    # Adam divides the round-off of a gradient that is zero by its own size; measured 4e-10.
    "AdamW": Row(configure=adam, tolerance=1e-8),
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


def test_hooks_are_called_as_often_as_without_us() -> None:
    watchers = Watcher(), Watcher()
    accumulate = {"accumulate_grad_batches": 2, "mixin": Recorder}
    ours = run("take-over", [*active(), watchers[0]], **accumulate)
    plain = run("take-over", [watchers[1]], **accumulate)
    assert ours.lightning_module.calls == plain.lightning_module.calls
    assert plain.lightning_module.calls["backward"] == 2 * BATCHES
    assert watchers[0].calls == watchers[1].calls


def lbfgs(self):
    return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("path", SUMS)
def test_lbfgs(path: str) -> None:
    ours, plain = (run("take-over", c, lbfgs) for c in (SUMS[path](), []))
    assert_same_run(ours, plain)  # measured 4e-14
    assert_trained(run("take-over", active(), lbfgs))


def test_lbfgs_is_refused_in_manual_optimization() -> None:
    with pytest.raises(MisconfigurationException, match="got LBFGS. Use another"):
        run("module", active(), lbfgs)


def growing() -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler({0: 1, 1: 2})


@pytest.mark.parametrize("path", SUMS)
def test_gradient_accumulation_scheduler(path: str) -> None:
    ours, plain = (run("take-over", [*c, growing()]) for c in (SUMS[path](), []))
    assert plain.global_step == BATCHES + -(-BATCHES // 2)
    assert_same_run(ours, plain)
    assert_trained(run("take-over", [*active(), growing()]))


def test_gradient_accumulation_scheduler_is_refused_in_manual_optimization() -> None:
    with pytest.raises((RuntimeError, MisconfigurationException), match="manual optimization"):
        run("module", [*active(), growing()])


@pytest.mark.parametrize("host", HOSTS)
def test_several_optimizers_are_refused(host: str) -> None:
    def two(self):
        return [sgd(self.encoder.parameters()), sgd(self.heads.parameters())]

    with pytest.raises((RuntimeError, MisconfigurationException), match="optimizer"):
        run(host, active(), two)


@pytest.mark.parametrize("host", HOSTS)
def test_an_overflow_skips_the_step(host: str) -> None:
    """The loss scale is too large for fp16 at first; steps are skipped as without us."""
    ours = ROWS["16-mixed, overflow"].run(host, SUMS["gradients"]())
    plain = plain_run("16-mixed, overflow")
    scales = [t.precision_plugin.scaler.get_scale() for t in (ours, plain)]
    assert scales == [2.0**16, 2.0**16]  # halved twice
