"""Trunks of the benchmarks. A model knows neither aggregators nor sharpness."""

from lightning_flatmtl.models.conv_encoder import ConvEncoder
from lightning_flatmtl.models.dense_head import DenseHead, UnitLength
from lightning_flatmtl.models.lenet_encoder import LeNetEncoder
from lightning_flatmtl.models.mlp_encoder import MLPEncoder
from lightning_flatmtl.models.resnet_encoder import ResNetEncoder

__all__ = [
    "ConvEncoder",
    "DenseHead",
    "LeNetEncoder",
    "MLPEncoder",
    "ResNetEncoder",
    "UnitLength",
]
