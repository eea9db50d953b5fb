"""Metrics of the benchmarks, on top of torchmetrics."""

from lightning_flatmtl.metrics.auroc import LogitAUROC
from lightning_flatmtl.metrics.baselines import load_baselines
from lightning_flatmtl.metrics.calibration import (
    BrierScore,
    ExpectedCalibrationError,
    PredictiveEntropy,
)
from lightning_flatmtl.metrics.class_counts import BalancedAccuracy, LabelF1, MacroF1
from lightning_flatmtl.metrics.delta_m import DeltaM, delta_m, delta_m_by_task
from lightning_flatmtl.metrics.depth import DepthError
from lightning_flatmtl.metrics.error_rate import ErrorRate, MeanErrorRate
from lightning_flatmtl.metrics.normals import NormalAngle, NormalsWithin
from lightning_flatmtl.metrics.regression_error import RegressionError

__all__ = [
    "BalancedAccuracy",
    "BrierScore",
    "DeltaM",
    "DepthError",
    "ErrorRate",
    "ExpectedCalibrationError",
    "LabelF1",
    "LogitAUROC",
    "MacroF1",
    "MeanErrorRate",
    "NormalAngle",
    "NormalsWithin",
    "PredictiveEntropy",
    "RegressionError",
    "delta_m",
    "delta_m_by_task",
    "load_baselines",
]
