"""The largest eigenvalue of a symmetric matrix that is known by its products with vectors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.gram import cross_gram, gram_matrix

__all__ = ["Eigenvalue", "top_eigenvalue"]


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue as far as it is known.

    Args:
        value: The Rayleigh quotient: never above the largest eigenvalue.
        residual: How long ``H v - value v`` is for the unit vector ``v`` found; within that of
            ``value`` there is an eigenvalue.
        converged: Whether the residual is within the tolerance.
        asymmetry: By how much ``u' H w`` and ``w' H u`` differ for two vectors, over the larger of
            both: what was taken for a symmetric matrix may be none.
    """

    value: float
    residual: float
    converged: bool
    asymmetry: float = 0.0


@torch.no_grad()
def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> Eigenvalue:
    r"""The largest eigenvalue of a symmetric :math:`H`, not the one of largest magnitude.

    Power iteration that goes, from a unit vector :math:`v`, to the best vector in the span of
    :math:`v`, :math:`H v` and its last move: the one with the largest Rayleigh quotient (Knyazev,
    2001, LOBPCG with a block of one). Where plain power iteration ends at an eigenvalue of large
    magnitude that is negative, or goes to and fro between two of opposite signs, this one climbs to
    the largest; it takes one product each like the plain one, and fewer of them.

    Args:
        product: Maps ``v`` to ``H v``.
        start: Where to begin, ``[d]``, anything but zero.
        iterations: How often to move, at least 1.
        tolerance: Done once ``|H v - value v| <= tolerance * |value|``.

    Example:
        >>> H = torch.diag(torch.tensor([-9.0, 2.0, 1.0], dtype=torch.float64))
        >>> found = top_eigenvalue(lambda v: H @ v, torch.ones(3).double(), 20, 1e-6)
        >>> round(found.value, 6), found.converged
        (2.0, True)
    """
    v = start / start.norm()
    image, fresh = product(v), True
    moves = images_of_moves = v.new_zeros(0, len(v))
    largest = asymmetry = 0.0
    for left in reversed(range(iterations + 1)):
        value = float(cross_gram(v[None], image[None]))
        rest = image - value * v
        residual = _length(rest)
        # Where the value itself is lost in the rounding of the products there is no more to find.
        largest = max(largest, _length(image))
        floor = 10 * torch.finfo(v.dtype).eps * largest
        done = residual <= max(tolerance * abs(value), floor)
        if left == 0 or not residual < math.inf or (done and fresh):
            break
        if done:  # by an image that is a sum of others: look once more
            image, fresh = product(v), True
            continue
        rest /= residual
        basis = torch.cat([v[None], rest[None], moves])
        images = torch.cat([image[None], product(rest)[None], images_of_moves])
        gram, products = gram_matrix(basis).cpu(), cross_gram(basis, images).cpu()
        if not len(moves):  # both images are products, not sums of others
            asymmetry = _asymmetry(products, largest)
        best = _best(gram, (products + products.T) / 2, torch.finfo(v.dtype).eps).to(v)
        move, its_image = best[1:] @ basis[1:], best[1:] @ images[1:]
        v, image, fresh = best @ basis, best @ images, False
        length = _length(v)
        v, image = v / length, image / length
        length = _length(move)
        moves, images_of_moves = (move / length)[None], (its_image / length)[None]
    return Eigenvalue(value, residual, done, asymmetry)


def _best(gram: Tensor, products: Tensor, eps: float) -> Tensor:
    """The combination of vectors with the largest Rayleigh quotient.

    Args:
        gram: Their inner products.
        products: Those with their images.
        eps: Of their type.
    """
    squares, directions = torch.linalg.eigh(gram)
    keep = squares > 100 * eps * squares[-1]
    whiten = directions[:, keep] / squares[keep].sqrt()
    _, vectors = torch.linalg.eigh(whiten.T @ products @ whiten)
    best: Tensor = whiten @ vectors[:, -1]
    return best


def _asymmetry(products: Tensor, largest: float) -> float:
    there, back = float(products[0, 1]), float(products[1, 0])
    return abs(there - back) / max(abs(there), abs(back), 1e-3 * largest, 1e-300)


def _length(vector: Tensor) -> float:
    return math.sqrt(float(gram_matrix(vector[None])))
