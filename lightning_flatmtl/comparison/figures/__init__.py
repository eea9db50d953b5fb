"""The figures of a comparison: ``figures/*.png``. Matplotlib is optional."""

from lightning_flatmtl.comparison.figures.styles import Style, styles_of
from lightning_flatmtl.comparison.figures.writing import write_figures

__all__ = ["Style", "styles_of", "write_figures"]
