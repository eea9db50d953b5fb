"""Data modules of the benchmarks."""

from lightning_flatmtl.data.multidigits import DigitPairs, MultiDigits

__all__ = ["DigitPairs", "MultiDigits"]
