"""Giving a direction the scale of the gradients."""

from torch import Tensor

__all__ = ["without_scale"]


def without_scale(gram: Tensor) -> Tensor:
    """The Gram divided by its Frobenius norm; a zero Gram stays as it is.

    Weights that solve a problem of the scaled Gram do not depend on the scale of the gradients, so
    the direction has it.
    """
    size = gram.norm().item()
    return gram / size if size > 0 else gram
