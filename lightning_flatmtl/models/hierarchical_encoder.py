"""Sequences of sequences: texts of sentences of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.models.sequence_encoder import (
    SequenceEncoder,
    SequenceFeatures,
    aside,
    check_lengths,
    checked_names,
)

__all__ = ["HierarchicalEncoder"]


class HierarchicalEncoder(nn.Module):
    r"""One encoder reads each part of a sequence, another one reads the parts.

    Texts of sentences, as in hierarchical networks for documents (`Yang et al., 2016
    <https://doi.org/10.18653/v1/N16-1174>`_, there with attention as pooling), sessions of visits,
    films of scenes. ``inner`` makes a vector of every part, ``outer`` reads these vectors in their
    order. Both are a :class:`RecurrentEncoder` or a :class:`SequenceTransformer`, in any mixture.

    A sample has as many parts as there are up to the last one with a length above 0; an empty part
    before it counts, as the vector that ``inner`` has for a sequence of length 0. A sample without
    any part is for ``outer`` a sequence of length 0.

    Without ``token_tasks`` and ``part_tasks`` it returns one vector a sample. With them it returns
    :class:`SequenceFeatures`: for the ones states of the tokens ``[n, parts, longest, features]``
    of ``inner``, which know nothing of the other parts, for the others states of the parts
    ``[n, parts, features]`` of ``outer``, and the vector for all other tasks.

    Shapes:
        ``{"tokens": int64 [n, parts, longest], "lengths": int64 [n, parts]}``, or ``"vectors"``
        with one axis more, to ``[n, outer.out_features]``.

    Args:
        inner: Reads the tokens of a part.
        outer: Reads the vectors of the parts: its ``in_features`` is ``inner.out_features``.
        token_tasks: Tasks that get the states of the tokens.
        part_tasks: Tasks that get the states of the parts.

    Attributes:
        out_features: Length of the vectors, and of the parts' states.

    Raises:
        ValueError: If the two do not fit each other, or the inputs are of another form.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import HierarchicalEncoder, RecurrentEncoder
        >>> words = RecurrentEncoder(vocabulary=50, units=8)
        >>> encoder = HierarchicalEncoder(words, RecurrentEncoder(in_features=16, units=4))
        >>> tokens = torch.tensor([[[4, 9, 2], [7, 0, 0]]])  # a text of two sentences
        >>> encoder({"tokens": tokens, "lengths": torch.tensor([[3, 1]])}).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        inner: SequenceEncoder,
        outer: SequenceEncoder,
        token_tasks: Sequence[str] = (),
        part_tasks: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, encoder in (("inner", inner), ("outer", outer)):
            if encoder.token_tasks:
                raise ValueError(
                    f"`{name}` must have no `token_tasks`, got {list(encoder.token_tasks)}. Name "
                    "them in the HierarchicalEncoder."
                )
        wanted = getattr(getattr(outer, "input", None), "in_features", inner.out_features)
        if wanted != inner.out_features:
            raise ValueError(
                f"`outer` must read vectors of `inner`, so `in_features={inner.out_features}`, got "
                f"{wanted}."
            )
        self.token_tasks = checked_names("token_tasks", token_tasks)
        self.part_tasks = checked_names("part_tasks", part_tasks)
        both = sorted({*self.token_tasks} & {*self.part_tasks})
        if both:
            raise ValueError(
                f"A task must be in one of `token_tasks` and `part_tasks`, got {both} in both."
            )
        self.inner, self.outer, self.out_features = inner, outer, outer.out_features

    @override
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | SequenceFeatures:
        """Map samples to a vector each, or to the features of every task."""
        lengths, given = self._checked(inputs)
        n, parts = lengths.shape
        flat = {key: x.flatten(0, 1) for key, x in given.items()}
        tokens, vectors = self.inner.read({**flat, "lengths": lengths.flatten()})
        number = torch.arange(1, parts + 1, device=lengths.device)
        counts = (number * (lengths > 0)).amax(1)
        outer = {"vectors": vectors.reshape(n, parts, -1), "lengths": counts}
        states, vector = self.outer.read(outer)
        if not self.token_tasks and not self.part_tasks:
            return vector
        tokens = aside(tokens).reshape(n, parts, *tokens.shape[1:])
        return SequenceFeatures(vector, tokens, aside(states), self.token_tasks, self.part_tasks)

    def _checked(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(inputs, Mapping) or "lengths" not in inputs:
            got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"The inputs must be a mapping with 'lengths' [n, parts], got {got}.")
        lengths = inputs["lengths"]
        if lengths.ndim != 2 or 0 in lengths.shape:
            raise ValueError(
                "'lengths' must have the shape [n, parts], at least one of each, got "
                f"{list(lengths.shape)}."
            )
        given = {key: x for key, x in inputs.items() if key in ("tokens", "vectors")}
        for key, x in given.items():
            if x.ndim < 3 or x.shape[:2] != lengths.shape:
                raise ValueError(
                    f"'{key}' must have the shape [n, parts, longest, ...] with 'lengths' "
                    f"{list(lengths.shape)}, got {list(x.shape)}."
                )
            check_lengths(lengths, lengths.shape, x.shape[2])
        return lengths, given
