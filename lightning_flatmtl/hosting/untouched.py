"""Parameters that no loss of any process reaches, in data-parallel training."""

from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["UntouchedGradients"]


class UntouchedGradients:
    """Takes the gradients of zero away that data-parallel training has to be given.

    Its reducer waits for a gradient of every parameter; an optimizer leaves a parameter alone only
    if it has none.
    """

    def __init__(self) -> None:
        self._touched: set[Tensor] = set()
        self._all_touched = False

    def begin(self) -> None:
        """A new group of accumulated batches begins."""
        self._touched.clear()
        self._all_touched = False

    def after_backward(self, params: Iterable[Tensor], untouched: Sequence[Tensor]) -> None:
        """Clear what no batch of the group has touched.

        Args:
            params: All trainable parameters.
            untouched: Those that the batch at hand has not touched.
        """
        if self._all_touched or not untouched:
            self._all_touched = True
            return
        spare = set(untouched)
        self._touched.update(p for p in params if p not in spare)
        for p in untouched:
            if p not in self._touched:
                p.grad = None
