"""Metrics of the benchmarks, on top of torchmetrics."""

from lightning_flatmtl.metrics.auroc import LogitAUROC
from lightning_flatmtl.metrics.baselines import load_baselines
from lightning_flatmtl.metrics.calibration import (
    BrierScore,
    ExpectedCalibrationError,
    PredictiveEntropy,
)
from lightning_flatmtl.metrics.delta_m import DeltaM, delta_m
from lightning_flatmtl.metrics.depth import DepthError
from lightning_flatmtl.metrics.error_rate import ErrorRate, MeanErrorRate
from lightning_flatmtl.metrics.normals import NormalAngle, NormalsWithin

__all__ = [
    "BrierScore",
    "DeltaM",
    "DepthError",
    "ErrorRate",
    "ExpectedCalibrationError",
    "LogitAUROC",
    "MeanErrorRate",
    "NormalAngle",
    "NormalsWithin",
    "PredictiveEntropy",
    "delta_m",
    "load_baselines",
]
