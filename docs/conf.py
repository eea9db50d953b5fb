"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

from importlib import metadata

project = "lightning-flatmtl"
author = "The lightning-flatmtl developers"
project_copyright = author
release = metadata.version("lightning-flatmtl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "results"]  # tables that pages include

# Pages are MyST markdown; docstrings stay reStructuredText.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

# Every example runs by itself; this only keeps Lightning from talking.
doctest_global_setup = """
import logging
import warnings

import lightning.pytorch

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
"""

html_theme = "furo"
html_title = f"lightning-flatmtl {release}"
html_copy_source = False
html_show_sphinx = False
