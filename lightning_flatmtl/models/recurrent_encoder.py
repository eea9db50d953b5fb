"""LSTM and GRU over sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from lightning_flatmtl.models.sequence_encoder import (
    SequenceEncoder,
    SequenceInput,
    check_choice,
    check_dropout,
    check_sizes,
    pooled,
)

__all__ = ["RecurrentEncoder"]


class RecurrentEncoder(SequenceEncoder):
    r"""LSTM or GRU over token ids or vectors, in one direction or in both.

    Long short-term memory (`Hochreiter and Schmidhuber, 1997
    <https://doi.org/10.1162/neco.1997.9.8.1735>`_) or gated recurrent units (Cho et al., 2014,
    `arXiv:1406.1078 <https://arxiv.org/abs/1406.1078>`_). Sequences are packed: the recurrence ends
    where a sequence ends, backwards it begins there. For the form of the inputs, sequences of
    length 0 and ``token_tasks`` see :class:`SequenceEncoder`.

    On a GPU the lengths are brought to the host once a pass, which packing needs.

    Shapes:
        ``{"tokens": int64 [n, longest], "lengths": int64 [n]}``, or with ``in_features``
        ``{"vectors": float [n, longest, in_features], ...}``, to ``[n, out_features]``.

    Args:
        vocabulary: Number of token ids, at least 1.
        in_features: Length of the vectors, at least 1, instead of ``vocabulary``.
        embedding: Length of a token's vector, at least 1.
        units: Units of each direction, at least 1.
        kind: ``"lstm"`` or ``"gru"``.
        layers: Layers, at least 1.
        bidirectional: Whether every layer reads backwards as well.
        dropout: Probability of dropping an entry of what a layer reads, in [0, 1).
        pooling: What becomes of a sequence's states: ``"last"``, the final one of each direction,
            ``"mean"`` or ``"max"``.
        token_tasks: Tasks that get the states of the tokens, see :class:`SequenceEncoder`.

    Attributes:
        out_features: Length of the vectors and states: ``units``, twice that in both directions.

    Raises:
        ValueError: If an argument is out of its bounds, or the inputs are of another form.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import RecurrentEncoder
        >>> encoder = RecurrentEncoder(vocabulary=50, units=8, token_tasks=["tags"])
        >>> tokens = torch.tensor([[4, 9, 2], [7, 0, 0]])
        >>> features = encoder({"tokens": tokens, "lengths": torch.tensor([3, 1])})
        >>> features["tags"].shape, features["topic"].shape
        (torch.Size([2, 3, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        vocabulary: int | None = None,
        in_features: int | None = None,
        embedding: int = 64,
        units: int = 64,
        kind: Literal["lstm", "gru"] = "lstm",
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        pooling: Literal["last", "mean", "max"] = "last",
        token_tasks: Sequence[str] = (),
    ) -> None:
        super().__init__(token_tasks)
        check_choice("kind", kind, ("lstm", "gru"))
        check_choice("pooling", pooling, ("last", "mean", "max"))
        check_sizes(units=units, layers=layers)
        check_dropout(dropout)
        self.input = SequenceInput(vocabulary, in_features, embedding)
        self.out_features = units * (2 if bidirectional else 1)
        self.pooling = pooling
        make = nn.LSTM if kind == "lstm" else nn.GRU
        inputs = [self.input.out_features, *[self.out_features] * (layers - 1)]
        # One by one, with dropout of torch's own between them: cuDNN's could not be repeated in
        # the second pass of TaskSAM.
        self.layers = nn.ModuleList(
            make(size, units, batch_first=True, bidirectional=bidirectional) for size in inputs
        )
        self.dropout = nn.Dropout(dropout)

    @override
    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states of the tokens ``[n, longest, features]``, and the vector ``[n, features]``."""
        x, lengths, there = self.input(inputs)
        longest = x.shape[1]
        if longest == 0:  # nothing but empty sequences: one step, of which nothing is kept
            x = nn.functional.pad(x, (0, 0, 0, 1))
        steps = lengths.clamp(min=1).cpu()  # packing knows no sequence without a step
        packed = pack_padded_sequence(x, steps, batch_first=True, enforce_sorted=False)
        final = x
        for layer in self.layers:
            packed, state = layer(self._dropped(packed))
            final = state[0] if isinstance(state, tuple) else state
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=max(longest, 1))
        states = states[:, :longest].masked_fill(~there[..., None], 0.0)
        if self.pooling == "last":
            ends = torch.cat(list(final), 1)  # of both directions, in the order of the batch
            return states, ends.masked_fill(lengths[:, None] == 0, 0.0)
        return states, _of_any(states, there, self.pooling)

    def _dropped(self, packed: PackedSequence) -> PackedSequence:
        return packed._replace(data=self.dropout(packed.data))


def _of_any(states: Tensor, there: Tensor, pooling: str) -> Tensor:
    if states.shape[1] == 0:  # there is no maximum of nothing
        return states.sum(1)
    return pooled(states, there, pooling)
