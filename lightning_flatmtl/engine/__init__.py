"""Algorithm 1 in pure torch; :mod:`lightning_flatmtl.engine.step` reads like it."""

from lightning_flatmtl.engine.aggregation import Aggregation, Part, SumOfLosses, TaskGradients
from lightning_flatmtl.engine.errors import FlatMTLError, NonFiniteError
from lightning_flatmtl.engine.gradients.gram import cross_gram, gram_matrix
from lightning_flatmtl.engine.gradients.surrogate import surrogate_loss
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.passes.buffers import frozen_buffers
from lightning_flatmtl.engine.passes.composed import ComposedPasses
from lightning_flatmtl.engine.passes.rng_replay import RNGReplay
from lightning_flatmtl.engine.passes.whole import WholePasses
from lightning_flatmtl.engine.result import PerturbedLosses
from lightning_flatmtl.engine.sharpness import Arm, Point, Sharpness
from lightning_flatmtl.engine.step import MultiTaskStep, StepResult

__all__ = [
    "Aggregation",
    "Arm",
    "ComposedPasses",
    "FlatMTLError",
    "MultiTaskStep",
    "NonFiniteError",
    "Part",
    "Partition",
    "Passes",
    "PerturbedLosses",
    "Point",
    "RNGReplay",
    "Sharpness",
    "StepResult",
    "SumOfLosses",
    "TaskGradients",
    "WholePasses",
    "cross_gram",
    "frozen_buffers",
    "gram_matrix",
    "surrogate_loss",
]
