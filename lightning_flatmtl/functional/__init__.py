"""Stateless mathematics: solvers on the m x m Gram matrix of the task gradients, and measures.

Every solver maps ``gram = G @ G.T`` to weights, ``direction = weights @ G``. The Gram may have any
floating-point type and device; it is brought to float64 on the CPU once, solved there in
variables scaled to unit gradients, and the weights come back as a float64 CPU tensor.
"""

from lightning_flatmtl.functional._convergence import ConvergenceWarning
from lightning_flatmtl.functional.aligned_mtl import aligned_mtl_weights
from lightning_flatmtl.functional.cagrad import cagrad_weights
from lightning_flatmtl.functional.con_fig import config_weights
from lightning_flatmtl.functional.conflict import conflict_rate, cosine_similarity
from lightning_flatmtl.functional.delta_m import delta_m, relative_improvement
from lightning_flatmtl.functional.fairgrad import fairgrad_weights
from lightning_flatmtl.functional.gradvac import GradVacResult, gradvac_weights
from lightning_flatmtl.functional.imtl import imtl_g_weights
from lightning_flatmtl.functional.min_norm import min_norm_weights
from lightning_flatmtl.functional.nash_mtl import nash_weights
from lightning_flatmtl.functional.pcgrad import pcgrad_weights
from lightning_flatmtl.functional.upgrad import upgrad_weights

__all__ = [
    "ConvergenceWarning",
    "GradVacResult",
    "aligned_mtl_weights",
    "cagrad_weights",
    "config_weights",
    "conflict_rate",
    "cosine_similarity",
    "delta_m",
    "fairgrad_weights",
    "gradvac_weights",
    "imtl_g_weights",
    "min_norm_weights",
    "nash_weights",
    "pcgrad_weights",
    "relative_improvement",
    "upgrad_weights",
]
