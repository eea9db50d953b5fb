"""Metrics of the benchmarks, on top of torchmetrics."""

from lightning_flatmtl.metrics.baselines import load_baselines
from lightning_flatmtl.metrics.delta_m import DeltaM, delta_m

__all__ = ["DeltaM", "delta_m", "load_baselines"]
