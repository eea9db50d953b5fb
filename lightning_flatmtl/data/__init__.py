"""Data modules of the benchmarks, splits, and loaders of several data sets."""

from lightning_flatmtl.data.celeba import CelebA
from lightning_flatmtl.data.census_income import CensusIncome, CensusRows
from lightning_flatmtl.data.clothing_reviews import ClothingReviews, ReviewTexts
from lightning_flatmtl.data.combined_data import CombinedData
from lightning_flatmtl.data.dense.cityscapes import Cityscapes
from lightning_flatmtl.data.dense.nyuv2 import NYUv2
from lightning_flatmtl.data.dense.random_scale_crop import RandomScaleCrop
from lightning_flatmtl.data.dense.targets import Depth, Normals, Segmentation
from lightning_flatmtl.data.multidigits import DigitPairs, MultiDigits
from lightning_flatmtl.data.multimnist import MNISTPairs, MultiMNIST
from lightning_flatmtl.data.splitting import split
from lightning_flatmtl.data.task_loader import TaskLoader

__all__ = [
    "CelebA",
    "CensusIncome",
    "CensusRows",
    "Cityscapes",
    "ClothingReviews",
    "CombinedData",
    "Depth",
    "DigitPairs",
    "MNISTPairs",
    "MultiDigits",
    "MultiMNIST",
    "NYUv2",
    "Normals",
    "RandomScaleCrop",
    "ReviewTexts",
    "Segmentation",
    "TaskLoader",
    "split",
]
