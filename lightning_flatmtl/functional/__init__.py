"""Stateless mathematics of all methods: solvers on the Gram matrix, loss weights, measures.

Every solver maps ``gram = G @ G.T`` to weights, ``direction = weights @ G``. The Gram may have any
floating-point type and device; it is brought to float64 on the CPU once, solved there in
variables scaled to unit gradients, and the weights come back as a float64 CPU tensor. Weights of
losses are computed from vectors ``[m]``, likewise. None of this needs Lightning.
"""

from lightning_flatmtl.functional._convergence import ConvergenceWarning
from lightning_flatmtl.functional.aligned_mtl import aligned_mtl_weights
from lightning_flatmtl.functional.auroc import auroc
from lightning_flatmtl.functional.cagrad import cagrad_weights
from lightning_flatmtl.functional.calibration import (
    brier_scores,
    calibration_bins,
    calibration_error,
    predictive_entropy,
)
from lightning_flatmtl.functional.class_counts import (
    balanced_accuracy,
    class_counts,
    label_counts,
    macro_f1,
)
from lightning_flatmtl.functional.con_fig import config_weights
from lightning_flatmtl.functional.conflict import conflict_rate, cosine_similarity
from lightning_flatmtl.functional.conic_grad import conic_grad_weights
from lightning_flatmtl.functional.db_mtl import db_mtl_weights
from lightning_flatmtl.functional.delta_m import (
    delta_m,
    delta_m_by_task,
    relative_improvement,
)
from lightning_flatmtl.functional.depth import depth_error_sums, depth_loss
from lightning_flatmtl.functional.dynamic_weight_average import dwa_weights
from lightning_flatmtl.functional.error_rate import wrong_predictions
from lightning_flatmtl.functional.excess_mtl import ExcessRisk, excess_risk
from lightning_flatmtl.functional.fairgrad import fairgrad_weights
from lightning_flatmtl.functional.famo import famo_gradient, famo_weights
from lightning_flatmtl.functional.geometric_loss import gls_weights
from lightning_flatmtl.functional.go4align import go4align_weights
from lightning_flatmtl.functional.graddrop import graddrop_direction
from lightning_flatmtl.functional.gradnorm import gradnorm_gradient
from lightning_flatmtl.functional.gradvac import GradVacResult, gradvac_weights
from lightning_flatmtl.functional.imtl import imtl_g_weights, imtl_l_gradient, imtl_l_weights
from lightning_flatmtl.functional.joint import (
    RiskCoverage,
    area_under_risk,
    most_likely_combinations,
    risk_coverage,
)
from lightning_flatmtl.functional.ldc_mtl import ldc_mtl_gradient, ldc_mtl_weights
from lightning_flatmtl.functional.mgda import mgda_weights
from lightning_flatmtl.functional.min_norm import min_norm_weights
from lightning_flatmtl.functional.moco import moco_weights, modo_weights
from lightning_flatmtl.functional.nash_mtl import clip_weights, nash_weights
from lightning_flatmtl.functional.normals import (
    angle_histogram,
    histogram_median,
    normal_angles,
    normals_loss,
)
from lightning_flatmtl.functional.ntkmtl import ntkmtl_weights
from lightning_flatmtl.functional.pcgrad import pcgrad_weights
from lightning_flatmtl.functional.scale_invariant import scale_invariant_weights
from lightning_flatmtl.functional.sdmgrad import sdmgrad_weights
from lightning_flatmtl.functional.segmentation import segmentation_loss
from lightning_flatmtl.functional.simplex import project_on_simplex
from lightning_flatmtl.functional.softmax import softmax_weights
from lightning_flatmtl.functional.stch import stch_weights
from lightning_flatmtl.functional.uncertainty_weighting import (
    uncertainty_gradient,
    uncertainty_weights,
)
from lightning_flatmtl.functional.upgrad import upgrad_weights
from lightning_flatmtl.functional.uw_so import uw_so_weights

__all__ = [
    "ConvergenceWarning",
    "ExcessRisk",
    "GradVacResult",
    "RiskCoverage",
    "aligned_mtl_weights",
    "angle_histogram",
    "area_under_risk",
    "auroc",
    "balanced_accuracy",
    "brier_scores",
    "cagrad_weights",
    "calibration_bins",
    "calibration_error",
    "class_counts",
    "clip_weights",
    "config_weights",
    "conflict_rate",
    "conic_grad_weights",
    "cosine_similarity",
    "db_mtl_weights",
    "delta_m",
    "delta_m_by_task",
    "depth_error_sums",
    "depth_loss",
    "dwa_weights",
    "excess_risk",
    "fairgrad_weights",
    "famo_gradient",
    "famo_weights",
    "gls_weights",
    "go4align_weights",
    "graddrop_direction",
    "gradnorm_gradient",
    "gradvac_weights",
    "histogram_median",
    "imtl_g_weights",
    "imtl_l_gradient",
    "imtl_l_weights",
    "label_counts",
    "ldc_mtl_gradient",
    "ldc_mtl_weights",
    "macro_f1",
    "mgda_weights",
    "min_norm_weights",
    "moco_weights",
    "modo_weights",
    "most_likely_combinations",
    "nash_weights",
    "normal_angles",
    "normals_loss",
    "ntkmtl_weights",
    "pcgrad_weights",
    "predictive_entropy",
    "project_on_simplex",
    "relative_improvement",
    "risk_coverage",
    "scale_invariant_weights",
    "sdmgrad_weights",
    "segmentation_loss",
    "softmax_weights",
    "stch_weights",
    "uncertainty_gradient",
    "uncertainty_weights",
    "upgrad_weights",
    "uw_so_weights",
    "wrong_predictions",
]
