"""Diagnostics: callbacks that only look, and never change how a model is trained."""

from lightning_flatmtl.callbacks._radius_results import RhoResults
from lightning_flatmtl.callbacks.calibration import Calibration
from lightning_flatmtl.callbacks.find_rho import find_rho
from lightning_flatmtl.callbacks.gradient_conflict import GradientConflict
from lightning_flatmtl.callbacks.loss_landscape import LossLandscape
from lightning_flatmtl.callbacks.noise_robustness import NoiseRobustness
from lightning_flatmtl.callbacks.rho_finder import RhoFinder
from lightning_flatmtl.callbacks.save_joint_predictions import SaveJointPredictions
from lightning_flatmtl.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_flatmtl.callbacks.task_average import TaskAverage
from lightning_flatmtl.callbacks.task_delta_m import TaskDeltaM

__all__ = [
    "Calibration",
    "GradientConflict",
    "LossLandscape",
    "NoiseRobustness",
    "RhoFinder",
    "RhoResults",
    "SaveJointPredictions",
    "SharpnessMonitor",
    "TaskAverage",
    "TaskDeltaM",
    "find_rho",
]
