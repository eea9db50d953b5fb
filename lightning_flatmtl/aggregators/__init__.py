"""Aggregators: callbacks that combine the gradients of several tasks, one file a method."""

from lightning_flatmtl.aggregators._base import Aggregator, GramAggregator, LossWeighting
from lightning_flatmtl.aggregators.aligned_mtl import AlignedMTL
from lightning_flatmtl.aggregators.by_group import ByGroup
from lightning_flatmtl.aggregators.cagrad import CAGrad
from lightning_flatmtl.aggregators.composition import Composition
from lightning_flatmtl.aggregators.con_fig import ConFIG
from lightning_flatmtl.aggregators.conic_grad import ConicGrad
from lightning_flatmtl.aggregators.db_mtl import DBMTL
from lightning_flatmtl.aggregators.dynamic_weight_average import DynamicWeightAverage
from lightning_flatmtl.aggregators.excess_mtl import ExcessMTL
from lightning_flatmtl.aggregators.fairgrad import FairGrad
from lightning_flatmtl.aggregators.famo import FAMO
from lightning_flatmtl.aggregators.geometric_loss import GLS
from lightning_flatmtl.aggregators.go4align import GO4Align
from lightning_flatmtl.aggregators.graddrop import GradDrop
from lightning_flatmtl.aggregators.gradnorm import GradNorm
from lightning_flatmtl.aggregators.gradvac import GradVac
from lightning_flatmtl.aggregators.imtl import IMTL, IMTLG, IMTLL
from lightning_flatmtl.aggregators.ldc_mtl import LDCMTL
from lightning_flatmtl.aggregators.linear_scalarization import LinearScalarization
from lightning_flatmtl.aggregators.mgda import MGDA
from lightning_flatmtl.aggregators.moco import MoCo
from lightning_flatmtl.aggregators.modo import MoDo
from lightning_flatmtl.aggregators.moving_average import MovingAverage
from lightning_flatmtl.aggregators.nash_mtl import NashMTL
from lightning_flatmtl.aggregators.ntkmtl import NTKMTL
from lightning_flatmtl.aggregators.pcgrad import PCGrad
from lightning_flatmtl.aggregators.random_loss_weighting import RandomLossWeighting
from lightning_flatmtl.aggregators.scale_invariant import ScaleInvariant
from lightning_flatmtl.aggregators.sdmgrad import SDMGrad
from lightning_flatmtl.aggregators.stch import STCH
from lightning_flatmtl.aggregators.torchjd import TorchJD
from lightning_flatmtl.aggregators.uncertainty_weighting import UncertaintyWeighting
from lightning_flatmtl.aggregators.upgrad import UPGrad
from lightning_flatmtl.aggregators.uw_so import UWSO

__all__ = [
    "DBMTL",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "LDCMTL",
    "MGDA",
    "NTKMTL",
    "STCH",
    "UWSO",
    "Aggregator",
    "AlignedMTL",
    "ByGroup",
    "CAGrad",
    "Composition",
    "ConFIG",
    "ConicGrad",
    "DynamicWeightAverage",
    "ExcessMTL",
    "FairGrad",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GramAggregator",
    "LinearScalarization",
    "LossWeighting",
    "MoCo",
    "MoDo",
    "MovingAverage",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "SDMGrad",
    "ScaleInvariant",
    "TorchJD",
    "UPGrad",
    "UncertaintyWeighting",
]
