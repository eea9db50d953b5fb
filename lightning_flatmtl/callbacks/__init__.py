"""Diagnostics: callbacks that only look, and never change how a model is trained."""

from lightning_flatmtl.callbacks.calibration import Calibration
from lightning_flatmtl.callbacks.gradient_conflict import GradientConflict

__all__ = ["Calibration", "GradientConflict"]
