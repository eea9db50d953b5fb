"""Trunks of the benchmarks. A model knows neither aggregators nor sharpness."""

from lightning_flatmtl.models.conv_encoder import ConvEncoder

__all__ = ["ConvEncoder"]
