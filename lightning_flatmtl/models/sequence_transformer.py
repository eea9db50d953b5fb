"""A Transformer encoder over sequences of different lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.models.sequence_encoder import (
    SequenceEncoder,
    SequenceInput,
    check_choice,
    check_dropout,
    check_sizes,
    pooled,
)

__all__ = ["SequenceTransformer"]


class SequenceTransformer(SequenceEncoder):
    r"""A Transformer encoder over token ids or vectors.

    Self-attention as by Vaswani et al. (2017, `arXiv:1706.03762
    <https://arxiv.org/abs/1706.03762>`_), but layers normalise before attention and feed-forward
    network, with a last normalisation behind them. Padding is masked: no token looks at it. For the
    form of the inputs, sequences of length 0 and ``token_tasks`` see :class:`SequenceEncoder`. (It
    is not called ``TransformerEncoder``, so that YAML's short class names tell it from torch's.)

    With ``pooling="mark"`` a learned mark stands before every sequence, as BERT's, and its state is
    the sequence's vector; it has position 0, the tokens follow. The mark of a sequence of length 0
    sees itself alone, so its vector is the same for all of them, and not 0.

    Shapes:
        ``{"tokens": int64 [n, longest], "lengths": int64 [n]}``, or with ``in_features``
        ``{"vectors": float [n, longest, in_features], ...}``, to ``[n, features]``.

    Args:
        vocabulary: Number of token ids, at least 1.
        in_features: Length of the vectors, at least 1, instead of ``vocabulary``; a linear layer
            brings them to ``features``.
        features: Length of all states, a multiple of ``heads``.
        layers: Layers, at least 1.
        heads: Attention heads of a layer, at least 1.
        feedforward: Width of the feed-forward networks, at least 1; ``None`` for 4 ``features``.
        dropout: Probability of dropping an entry, in [0, 1).
        positions: ``"learned"``, a vector for each place, or ``"sinusoidal"``, the published sines
            and cosines, which know no longest sequence; those need an even number of features.
        longest: How many tokens a sequence may have with learned positions, at least 1.
        pooling: What a sequence's vector is: the state of a ``"mark"``, or ``"mean"`` or ``"max"``
            of its tokens' states.
        token_tasks: Tasks that get the states of the tokens, see :class:`SequenceEncoder`.

    Attributes:
        out_features: Length of the vectors and states.

    Raises:
        ValueError: If an argument is out of its bounds, or the inputs are of another form or longer
            than the learned positions.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import SequenceTransformer
        >>> encoder = SequenceTransformer(vocabulary=50, features=16, token_tasks=["tags"])
        >>> tokens = torch.tensor([[4, 9, 2], [7, 0, 0]])
        >>> features = encoder({"tokens": tokens, "lengths": torch.tensor([3, 1])})
        >>> features["tags"].shape, features["topic"].shape
        (torch.Size([2, 3, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        vocabulary: int | None = None,
        in_features: int | None = None,
        features: int = 64,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.1,
        positions: Literal["learned", "sinusoidal"] = "learned",
        longest: int = 512,
        pooling: Literal["mark", "mean", "max"] = "mark",
        token_tasks: Sequence[str] = (),
    ) -> None:
        super().__init__(token_tasks)
        check_choice("positions", positions, ("learned", "sinusoidal"))
        check_choice("pooling", pooling, ("mark", "mean", "max"))
        check_sizes(
            features=features, layers=layers, heads=heads, feedforward=feedforward, longest=longest
        )
        check_dropout(dropout)
        if features % heads:
            raise ValueError(f"`features` must be a multiple of `heads`={heads}, got {features}.")
        if positions == "sinusoidal" and features % 2:
            raise ValueError(f"`features` must be even for sines and cosines, got {features}.")
        self.input = SequenceInput(vocabulary, in_features, features)
        self.project = nn.Identity() if in_features is None else nn.Linear(in_features, features)
        self.mark = nn.Parameter(torch.randn(features)) if pooling == "mark" else None
        places = longest + (self.mark is not None)
        learned = positions == "learned"
        self.positions = nn.Parameter(0.1 * torch.randn(places, features)) if learned else None
        width = 4 * features if feedforward is None else feedforward
        # Each drawn by itself; nn.TransformerEncoder would begin with equal layers.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                features, heads, width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.dropout = nn.LayerNorm(features), nn.Dropout(dropout)
        self.pooling, self.out_features = pooling, features

    @override
    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states of the tokens ``[n, longest, features]``, and the vector ``[n, features]``."""
        x, lengths, there = self.input(inputs)
        x, seen = self.project(x), there
        if self.mark is not None:
            x = torch.cat([self.mark.expand(len(x), 1, -1), x], 1)
            seen = nn.functional.pad(there, (1, 0), value=True)
        elif x.shape[1] == 0:
            return x, x.sum(1)
        else:  # attention to nothing would be NaN; an empty sequence's states are set to 0 below
            seen = there | (lengths[:, None] == 0)
        x = self.dropout(x + self._places(x))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~seen)
        x = self.norm(x)
        states = x if self.mark is None else x[:, 1:]
        states = states.masked_fill(~there[..., None], 0.0)
        return states, x[:, 0] if self.mark is not None else pooled(states, there, self.pooling)

    def _places(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        if self.positions is None:
            return _sines(count, x)
        if count > len(self.positions):
            mark = self.mark is not None
            raise ValueError(
                f"Sequences must be padded to at most `longest`={len(self.positions) - mark} "
                f"tokens, got {count - mark}. Cut them, or set `longest` or "
                "`positions='sinusoidal'`."
            )
        return self.positions[:count]


def _sines(count: int, like: Tensor) -> Tensor:
    """Sines in the even columns and cosines in the odd ones, ``[count, features]``."""
    features = like.shape[-1]
    columns = torch.arange(0, features, 2, device=like.device, dtype=torch.float64)
    rates = torch.exp(-math.log(10_000.0) / features * columns)
    angles = torch.arange(count, device=like.device, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)
