"""Data modules of the benchmarks."""

from lightning_flatmtl.data.celeba import CelebA
from lightning_flatmtl.data.multidigits import DigitPairs, MultiDigits
from lightning_flatmtl.data.multimnist import MNISTPairs, MultiMNIST

__all__ = ["CelebA", "DigitPairs", "MNISTPairs", "MultiDigits", "MultiMNIST"]
