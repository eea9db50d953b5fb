"""Giving a direction the scale of the gradients."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, to_tensor

__all__ = ["without_scale"]


def without_scale(gram: Tensor) -> Tensor:
    """The Gram divided by its Frobenius norm; a zero Gram stays as it is.

    Weights that solve a problem of the scaled Gram do not depend on the scale of the gradients, so
    the direction has it.
    """
    K = to_tensor(gram_array(gram))
    size = K.norm().item()
    return K / size if size > 0 else K
