"""What encoders of sequences take, and what they hand to the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

__all__ = ["SequenceEncoder", "SequenceFeatures"]


class SequenceFeatures(Mapping[str, Tensor]):
    """The features of each task: states of the tokens, of the parts, or one vector a sequence.

    Tasks named in ``token_tasks`` find the states of the tokens, those in ``part_tasks`` the states
    of the parts, and **any other name finds the vector**, as in a ``defaultdict``. Iterating lists
    the names that were given.

    Args:
        vector: One vector a sequence, ``[n, features]``.
        tokens: A state for every token, ``[n, longest, features]``, or with parts
            ``[n, parts, longest, features]``; 0 behind a sequence's end.
        parts: A state for every part, ``[n, parts, features]``, if sequences have any.
        token_tasks: Tasks that are about tokens.
        part_tasks: Tasks that are about parts.
    """

    def __init__(
        self,
        vector: Tensor,
        tokens: Tensor,
        parts: Tensor | None = None,
        token_tasks: Collection[str] = (),
        part_tasks: Collection[str] = (),
    ) -> None:
        self.vector, self.tokens, self.parts = vector, tokens, parts
        self.token_tasks, self.part_tasks = tuple(token_tasks), tuple(part_tasks)

    @override
    def __getitem__(self, task: str) -> Tensor:
        if task in self.token_tasks:
            return self.tokens
        if task in self.part_tasks:
            assert self.parts is not None
            return self.parts
        return self.vector

    @override
    def __contains__(self, task: object) -> bool:
        return isinstance(task, str)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter((*self.token_tasks, *self.part_tasks))

    @override
    def __len__(self) -> int:
        return len(self.token_tasks) + len(self.part_tasks)


# The tensors of it are where the trunk ends: who cuts the graph there finds all of the encoder.
pytree.register_pytree_node(
    SequenceFeatures,
    lambda f: ([f.vector, f.tokens, f.parts], (f.token_tasks, f.part_tasks)),
    lambda children, names: SequenceFeatures(*children, *names),
)


class SequenceEncoder(nn.Module, ABC):
    """Base of the encoders of sequences of different lengths.

    Inputs are a mapping, padded to the longest of the batch:

    - ``{"tokens": int64 [n, longest], "lengths": int64 [n]}``, ids below ``vocabulary``, or
    - ``{"vectors": float [n, longest, in_features], "lengths": int64 [n]}``.

    What stands behind a sequence's end is never read, so it may be anything, and the result does
    not depend on how far a batch is padded. A sequence of length 0 is allowed: the states and the
    pooled vector of nothing are 0.

    Without ``token_tasks`` an encoder returns one vector a sequence, ``[n, out_features]``. With
    them it returns :class:`SequenceFeatures`, in which these tasks find the states of the tokens
    and all others the vector.

    A subclass writes :meth:`read`.

    Args:
        token_tasks: Names of the tasks that are about tokens.

    Attributes:
        out_features: Length of the vectors and states.

    Raises:
        ValueError: If the inputs are of another form, a length is not in [0, longest] or an id not
            in [0, vocabulary); on a GPU the last two are assertions of the device instead.
    """

    out_features: int

    def __init__(self, token_tasks: Sequence[str] = ()) -> None:
        super().__init__()
        self.token_tasks = checked_names("token_tasks", token_tasks)

    @abstractmethod
    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states of the tokens ``[n, longest, features]``, and the vector ``[n, features]``."""

    @override
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | SequenceFeatures:
        """Map sequences to a vector each, or to the features of every task."""
        states, vector = self.read(inputs)
        if not self.token_tasks:
            return vector
        return SequenceFeatures(vector, aside(states), token_tasks=self.token_tasks)


class SequenceInput(nn.Module):
    """Embeds the tokens of a batch, or takes its vectors; checks both.

    Args:
        vocabulary: Number of ids, for tokens.
        in_features: Length of the vectors, instead of ``vocabulary``.
        embedding: Length of a token's vector.
    """

    def __init__(self, vocabulary: int | None, in_features: int | None, embedding: int) -> None:
        super().__init__()
        if (vocabulary is None) == (in_features is None):
            raise ValueError(
                "One of `vocabulary` (of token ids) and `in_features` (of vectors) must be given, "
                f"got {vocabulary} and {in_features}."
            )
        check_sizes(vocabulary=vocabulary, in_features=in_features, embedding=embedding)
        self.vocabulary, self.in_features = vocabulary, in_features
        self.table = None if vocabulary is None else nn.Embedding(vocabulary, embedding)
        self.out_features = embedding if in_features is None else in_features
        self.kind = "vectors" if vocabulary is None else "tokens"

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``[n, longest, features]``, lengths, and which positions are no padding."""
        given, lengths = self._checked(inputs)
        places = torch.arange(given.shape[1], device=given.device)
        there = places < lengths[:, None]
        if self.table is None:  # NaN in the padding would get through a product with 0
            return given.masked_fill(~there[..., None], 0.0), lengths, there
        ids = given.masked_fill(~there, 0)
        self._check_ids(ids)
        return self.table(ids), lengths, there

    def _checked(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        wanted = (self.kind, "lengths")
        if not isinstance(inputs, Mapping) or any(key not in inputs for key in wanted):
            got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"The inputs must be a mapping with {list(wanted)}, got {got}.")
        given, lengths = inputs[self.kind], inputs["lengths"]
        shape = "[n, longest]" if self.table is not None else f"[n, longest, {self.in_features}]"
        fits = given.ndim == 2 if self.table is not None else given.ndim == 3
        if not fits or (self.table is None and given.shape[-1] != self.in_features):
            raise ValueError(f"'{self.kind}' must have the shape {shape}, got {list(given.shape)}.")
        if given.is_floating_point() is not (self.table is None):
            must = "floating-point numbers" if self.table is None else "integers"
            raise ValueError(f"'{self.kind}' must be {must}, got {given.dtype}.")
        check_lengths(lengths, given.shape[:1], given.shape[1])
        return given, lengths

    def _check_ids(self, ids: Tensor) -> None:
        assert self.vocabulary is not None
        fits = (ids >= 0) & (ids < self.vocabulary)
        if waits(ids):
            if not fits.all():
                raise ValueError(
                    f"'tokens' must be in [0, {self.vocabulary}), as `vocabulary` says, got "
                    f"{int(ids[~fits][0])}."
                )
        else:
            torch.ops.aten._assert_async.msg(fits.all(), "`vocabulary` is too small for the tokens")


def check_lengths(lengths: Tensor, shape: torch.Size, longest: int) -> None:
    """Refuse lengths of another shape, type or size."""
    if lengths.shape != shape or lengths.is_floating_point():
        raise ValueError(
            f"'lengths' must be integers of the shape {list(shape)}, got {lengths.dtype} of "
            f"{list(lengths.shape)}."
        )
    if len(lengths) == 0:
        raise ValueError("A batch must hold at least one sequence, got none.")
    fits = (lengths >= 0) & (lengths <= longest)
    if waits(lengths):
        if not fits.all():
            raise ValueError(
                f"'lengths' must be in [0, {longest}], the padded length, got "
                f"{int(lengths[~fits][0])}."
            )
    else:
        torch.ops.aten._assert_async.msg(fits.all(), "'lengths' must be in [0, longest]")


def waits(tensor: Tensor) -> bool:
    """Whether its values may be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def pooled(states: Tensor, there: Tensor, how: str) -> Tensor:
    """Mean or maximum of the states ``[n, longest, features]`` that are there, 0 of none."""
    at = there[..., None]
    if how == "mean":
        return states.masked_fill(~at, 0.0).sum(1) / at.sum(1).clamp(min=1)
    greatest = states.masked_fill(~at, -torch.inf).amax(1)
    return torch.where(at.any(1), greatest, 0.0)


def aside(states: Tensor) -> Tensor:
    """The same states as an end of the graph of their own.

    Nothing else is computed from it, so that a gradient with respect to it and one with respect to
    the vector add up to the whole, and nothing counts twice.
    """
    return states.view_as(states)


def checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks as a tuple."""
    if isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"`{argument}` must be a list of different names, got {names!r}.")
    return tuple(names)


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        known = " or ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be {known}, got {value!r}.")


def check_dropout(dropout: float) -> None:
    """Refuse a probability outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
