"""Metrics of the benchmarks, on top of torchmetrics."""

from lightning_flatmtl.metrics.baselines import load_baselines
from lightning_flatmtl.metrics.calibration import (
    BrierScore,
    ExpectedCalibrationError,
    PredictiveEntropy,
)
from lightning_flatmtl.metrics.delta_m import DeltaM, delta_m

__all__ = [
    "BrierScore",
    "DeltaM",
    "ExpectedCalibrationError",
    "PredictiveEntropy",
    "delta_m",
    "load_baselines",
]
