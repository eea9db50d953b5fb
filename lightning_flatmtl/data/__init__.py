"""Data modules of the benchmarks."""

from lightning_flatmtl.data.multidigits import DigitPairs, MultiDigits
from lightning_flatmtl.data.multimnist import MNISTPairs, MultiMNIST

__all__ = ["DigitPairs", "MNISTPairs", "MultiDigits", "MultiMNIST"]
