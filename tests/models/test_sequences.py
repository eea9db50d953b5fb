"""Encoders of sequences: against loops over unpadded sequences, and in training."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_flatmtl import (
    BinaryTask,
    ClassificationTask,
    MultiTaskModule,
    RegressionTask,
    TaggingTask,
    TaskSAM,
)
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine.partition import reached_parameters
from lightning_flatmtl.models import (
    HierarchicalEncoder,
    RecurrentEncoder,
    SequenceFeatures,
    SequenceTransformer,
)
from tests import naive
from tests.helpers import assert_close, assert_identical, fit, sgd

LENGTHS = [3, 5, 0, 1, 4]
WORDS = 11
SMALL: dict[str, Any] = {
    "lstm": lambda **given: RecurrentEncoder(**{"embedding": 3, "units": 4, **given}),
    "gru": lambda **given: RecurrentEncoder(**{"embedding": 3, "units": 4, "kind": "gru", **given}),
    "transformer": lambda **given: SequenceTransformer(
        **{"features": 8, "heads": 2, "dropout": 0.0, "longest": 9, **given}
    ),
}


def made(name: str, **given: Any) -> Any:
    torch.manual_seed(0)
    given = {"vocabulary": WORDS, **given}
    if "in_features" in given:
        del given["vocabulary"]
    return SMALL[name](**given).double()


def rows(vectors: bool = False, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    if vectors:
        return [torch.randn(k, 2, generator=g, dtype=torch.float64) for k in LENGTHS]
    return [torch.randint(0, WORDS, (k,), generator=g) for k in LENGTHS]


def batch(found: list[Tensor], more: int = 0, filled: float = 0) -> dict[str, Tensor]:
    longest = max(map(len, found)) + more
    key = "vectors" if found[0].is_floating_point() else "tokens"
    shape = (len(found), longest, *found[0].shape[1:])
    x = torch.full(shape, filled, dtype=found[0].dtype)
    for i, row in enumerate(found):
        x[i, : len(row)] = row
    return {key: x, "lengths": torch.tensor([len(row) for row in found])}


# Naive: one sequence at a time, one step or one position at a time, without torch's layers.


def step(kind: str, cell: dict[str, Tensor], x: Tensor, state: Any) -> Any:
    h, c = state
    xs, hs = cell["wi"] @ x + cell["bi"], cell["wh"] @ h + cell["bh"]
    if kind == "lstm":
        i, f, g, o = (xs + hs).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    (xr, xz, xn), (hr, hz, hn) = xs.chunk(3), hs.chunk(3)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + r * hn) + z * h, c


def naive_recurrent(encoder: RecurrentEncoder, kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The states of one sequence, and the last one of each direction."""
    inputs = list(x)
    for layer in encoder.layers:
        of_direction, ends = [], []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            names = {"wi": "weight_ih", "wh": "weight_hh", "bi": "bias_ih", "bh": "bias_hh"}
            cell = {key: getattr(layer, f"{name}_l0{suffix}") for key, name in names.items()}
            zero = torch.zeros(layer.hidden_size, dtype=x.dtype)
            state, states = (zero, zero), []
            for token in reversed(inputs) if suffix else inputs:
                state = step(kind, cell, token, state)
                states.append(state[0])
            of_direction.append(states[::-1] if suffix else states)
            ends.append(state[0])
        inputs = [torch.cat(both) for both in zip(*of_direction, strict=True)]
    states = torch.stack(inputs) if inputs else torch.zeros(0, encoder.out_features, dtype=x.dtype)
    return states, torch.cat(ends)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    x = (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt()
    return x * layer.weight + layer.bias


def naive_transformer(encoder: SequenceTransformer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The states of one sequence without any mask, and that of the mark."""
    states = list(x)
    if encoder.mark is not None:
        states = [encoder.mark, *states]
    size = encoder.out_features
    for place in range(len(states)):
        if encoder.positions is not None:
            added = encoder.positions[place]
        else:
            rates = [10_000 ** (-2 * (k // 2) / size) for k in range(size)]
            waves = [
                math.cos(place * r) if k % 2 else math.sin(place * r) for k, r in enumerate(rates)
            ]
            added = torch.tensor(waves, dtype=torch.float64)
        states[place] = states[place] + added
    for layer in encoder.layers:
        attention, width = layer.self_attn, size // layer.self_attn.num_heads
        normed = [norm(layer.norm1, s) for s in states]
        weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k, v = ([w @ s + b for s in normed] for w, b in zip(weight, bias, strict=True))
        looked = []
        for query in q:
            heads = []
            for head in range(attention.num_heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([query[part] @ key[part] for key in k]) / math.sqrt(width)
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
                heads.append(sum(w * value[part] for w, value in zip(weights, v, strict=True)))
            looked.append(attention.out_proj(torch.cat(heads)))
        states = [s + seen for s, seen in zip(states, looked, strict=True)]
        states = [
            s + layer.linear2(nn.functional.gelu(layer.linear1(norm(layer.norm2, s))))
            for s in states
        ]
    states = [norm(encoder.norm, s) for s in states]
    mark = states.pop(0) if encoder.mark is not None else None
    return torch.stack(states) if states else torch.zeros(0, size, dtype=torch.float64), mark


def naive_encoder(encoder: Any, kind: str, row: Tensor) -> tuple[Tensor, Tensor]:
    """States and vector of one unpadded sequence."""
    x = row if encoder.input.table is None else encoder.input.table.weight[row]
    if kind == "transformer":
        states, end = naive_transformer(encoder, encoder.project(x))
    else:
        states, end = naive_recurrent(encoder, kind, x)
    if encoder.pooling in ("last", "mark"):
        return states, end
    if not len(states):
        return states, torch.zeros(encoder.out_features, dtype=torch.float64)
    return states, states.mean(0) if encoder.pooling == "mean" else states.max(0).values


CASES = [
    *((kind, {"pooling": p}) for kind in ("lstm", "gru") for p in ("last", "mean", "max")),
    *(("transformer", {"pooling": p}) for p in ("mark", "mean", "max")),
    *((kind, {"layers": 3, "bidirectional": False}) for kind in ("lstm", "gru")),
    ("lstm", {"layers": 2}),
    ("transformer", {"positions": "sinusoidal", "layers": 1}),
    *((kind, {"in_features": 2}) for kind in SMALL),
]


@pytest.mark.parametrize(("kind", "given"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_as_loops_over_unpadded_sequences(kind, given, training) -> None:
    encoder = made(kind, **given, token_tasks=["tags"]).train(training)
    found = rows("in_features" in given)
    with torch.set_grad_enabled(training):
        features = encoder(batch(found))
    assert features["tags"].shape == (5, 5, encoder.out_features)
    for i, row in enumerate(found):
        states, vector = naive_encoder(encoder, kind, row)
        torch.testing.assert_close(features["tags"][i, : len(row)], states, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(features["other"][i], vector, rtol=1e-10, atol=1e-12)
        assert not features["tags"][i, len(row) :].any()


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("vectors", [True, False])
def test_neither_padding_nor_the_order_of_the_batch_matters(kind, vectors) -> None:
    encoder = made(kind, **({"in_features": 2} if vectors else {}), token_tasks=["tags"])
    found = rows(vectors)
    filled = torch.nan if vectors else 99  # never read
    one, other = encoder(batch(found)), encoder(batch(found[::-1], more=3, filled=filled))
    torch.testing.assert_close(one["a"], other["a"].flip(0), rtol=1e-12, atol=1e-14)
    tags = other["tags"].flip(0)
    torch.testing.assert_close(one["tags"], tags[:, :5], rtol=1e-12, atol=1e-14)
    grads = [
        torch.autograd.grad(x["a"].square().sum() + x["tags"].pow(3).sum(), encoder.parameters())
        for x in (one, other)
    ]
    for mine, theirs in zip(*grads, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("longest", [0, 2])
def test_a_batch_of_nothing_but_empty_sequences(kind, longest) -> None:
    encoder = made(kind, token_tasks=["tags"])
    nothing = torch.zeros(3, longest, dtype=torch.int64)
    features = encoder({"tokens": nothing, "lengths": torch.zeros(3, dtype=torch.int64)})
    assert features["tags"].shape == (3, longest, 8)
    assert not features["tags"].any()
    assert features["a"].isfinite().all()
    assert bool(features["a"].any()) == (kind == "transformer")  # the mark sees itself
    torch.testing.assert_close(features["a"], features["a"][:1].expand(3, -1))


# Sequences of sequences.


@pytest.mark.parametrize("inner", SMALL)
@pytest.mark.parametrize("outer", SMALL)
def test_parts_are_read_one_by_one_and_then_in_their_order(inner, outer) -> None:
    words, texts = made(inner), made(outer, in_features=8)
    encoder = HierarchicalEncoder(words, texts, token_tasks=["tags"], part_tasks=["kinds"])
    lengths = torch.tensor([[2, 3, 0], [0, 1, 4], [0, 0, 0]])
    tokens = torch.randint(0, WORDS, (3, 3, 4), generator=torch.Generator().manual_seed(1))
    features = encoder({"tokens": tokens, "lengths": lengths})
    assert {task: list(features[task].shape) for task in ("tags", "kinds", "topic")} == {
        "tags": [3, 3, 4, 8],
        "kinds": [3, 3, 8],
        "topic": [3, 8],
    }
    assert not features["kinds"][0, 2].any()
    for i, parts in enumerate([2, 3, 0]):  # an empty part before the last one counts
        read = [naive_encoder(words, inner, tokens[i, p, : lengths[i, p]]) for p in range(parts)]
        for p, (states, _) in enumerate(read):
            torch.testing.assert_close(features["tags"][i, p, : lengths[i, p]], states)
        vectors = torch.stack([v for _, v in read]) if read else torch.zeros(0, 8).double()
        states, vector = naive_encoder(texts, outer, vectors)
        torch.testing.assert_close(features["kinds"][i, :parts], states, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(features["topic"][i], vector, rtol=1e-10, atol=1e-12)
    alone = HierarchicalEncoder(words, texts)({"tokens": tokens, "lengths": lengths})
    torch.testing.assert_close(alone, features["topic"])


# In training.


def samples(count: int, seed: int = 0) -> DataLoader:
    """Batches of four: one sequence is empty, some labels are missing."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        found = [torch.randint(0, WORDS, (k,), generator=g) for k in (2, 5, 0, 3)]
        x = batch(found)
        tags = torch.randint(0, 3, (4, 5), generator=g)
        tags[torch.arange(5) >= x["lengths"][:, None]] = -100
        tags[1, 0] = -100
        value = torch.randn(4, generator=g, dtype=torch.float64)
        value[3] = torch.nan
        targets = {"tags": tags, "kind": torch.randint(0, 2, (4,), generator=g), "value": value}
        batches.append((x, targets))
    return DataLoader(batches, batch_size=None)


TASKS = ("tags", "kind", "value")


def module(encoder: nn.Module, names: Sequence[str] = TASKS, **given: Any) -> MultiTaskModule:
    torch.manual_seed(1)
    tasks = [
        TaggingTask("tags", 8, 3),
        ClassificationTask("kind", 8, 2),
        RegressionTask("value", 8, missing=float("nan")),
    ]
    kept = [task for task in tasks if task.name in names]
    return MultiTaskModule(encoder, kept, sgd, **given).double()


def loss_by_hand(model: MultiTaskModule, kind: str, params: Any, task: str, x: Any) -> Tensor:
    """The loss of one task, sequence by sequence, from the naive encoder."""
    found = copy.copy(model)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = found

        def forward(self) -> Tensor:
            inputs, targets = x
            losses = []
            for i, length in enumerate(inputs["lengths"].tolist()):
                row = inputs["tokens"][i, :length]
                states, vector = naive_encoder(found.encoder, kind, row)
                head = found.heads[task]
                target = targets[task][i]
                if task == "tags":
                    kept = [t for t in range(length) if target[t] != -100]
                    if kept:
                        logits = states[kept] @ head.weight.T + head.bias
                        losses.append(nn.functional.cross_entropy(logits, target[kept]))
                elif task == "kind":
                    logits = head.weight @ vector + head.bias
                    losses.append(nn.functional.cross_entropy(logits[None], target[None]))
                elif not target.isnan():
                    losses.append((head[0].weight[0] @ vector + head[0].bias[0] - target) ** 2)
            return torch.stack(losses).mean()

    return functional_call(Net(), {f"model.{n}": p for n, p in params.items()}, ())


@pytest.mark.parametrize("kind", ["gru", "transformer"])
@pytest.mark.parametrize(
    ("names", "point"),
    [(("tags", "kind"), "separate"), (("tags", "value"), "joint"), (("kind", "value"), "separate")],
)
def test_it_is_trained_as_algorithm_1_says(kind, names, point) -> None:
    given = {"token_tasks": ["tags"], **({"layers": 1} if kind == "transformer" else {})}
    ours = module(made(kind, **given), names)
    by_hand = copy.deepcopy(ours)
    fit(ours, [CAGrad(0.4), TaskSAM(0.05, point=point)], samples(2))
    params = [n for n, _ in by_hand.named_parameters()]
    shared = [n for n in params if n.startswith("encoder.")]
    heads = {t: [n for n in params if n.startswith(f"heads.{t}.")] for t in names}
    optimizer = by_hand.configure_optimizers()
    for x in samples(2):

        def loss_of(task: str, x: Any = x) -> Any:
            return lambda params: loss_by_hand(by_hand, kind, params, task, x)

        at = {n: p.detach().clone() for n, p in by_hand.named_parameters()}
        losses = {task: loss_of(task) for task in heads}
        grads = naive.f_mtl_gradients(
            losses, at, shared, heads, naive.cagrad(0.4), rho=0.05, point=point
        )
        for n, p in by_hand.named_parameters():
            p.grad = grads[n]
        optimizer.step()
    assert_close(ours, by_hand, 1e-9)


@pytest.mark.parametrize("kind", SMALL)
def test_all_of_the_encoder_is_shared(kind) -> None:
    ours = module(made(kind, token_tasks=["tags"]))
    fit(ours, [CAGrad(), TaskSAM(0.05)], samples(1))
    params = dict(ours.named_parameters())
    shared = ours.engine.partition.shared(list(params.values()))
    found = {n for n, p in params.items() if any(p is q for q in shared)}
    assert found == {n for n in params if n.startswith("encoder.")}


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_at_the_features_nothing_counts_twice(kind) -> None:
    """With the plain sum the gradient at the features is the gradient at the parameters."""
    ours = module(made(kind, token_tasks=["tags"], pooling="mean"), gradients="features")
    plain = module(made(kind, token_tasks=["tags"], pooling="mean"))
    for model in (ours, plain):
        fit(model, [], samples(2))
    assert_close(ours, plain, 1e-10)


@pytest.mark.parametrize("kind", SMALL)
def test_the_inner_products_are_found_layer_by_layer(kind) -> None:
    models = [
        module(made(kind, token_tasks=["tags"]), gradients=gradients)
        for gradients in ("parameters", "gram")
    ]
    for model in models:
        fit(model, [CAGrad()], samples(2))
    assert_close(*models, 1e-9)


@pytest.mark.parametrize("outer", ["gru", "transformer"])
def test_a_hierarchy_is_trained_as_a_whole_model_is(outer) -> None:
    """Against the same model whose losses are written as one function, without features by task."""

    def model(kind: type[MultiTaskModule]) -> MultiTaskModule:
        torch.manual_seed(0)
        encoder = HierarchicalEncoder(
            made("lstm"), made(outer, in_features=8), token_tasks=["tags"], part_tasks=["parts"]
        )
        tasks = [TaggingTask("tags", 8, 3), TaggingTask("parts", 8, 2), BinaryTask("yes", 8)]
        return kind(encoder, tasks, sgd).double()

    class Whole(MultiTaskModule):
        def losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            features = self.encoder(batch[0])
            return {
                task.name: task.loss(
                    *task.labelled(self.heads[task.name](features[task.name]), batch[1][task.name])
                )
                for task in self.tasks
            }

    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[2, 3, 0], [0, 1, 4], [1, 0, 0]])
    inputs = {"tokens": torch.randint(0, WORDS, (3, 3, 4), generator=g), "lengths": lengths}
    tags = torch.randint(0, 3, (3, 3, 4), generator=g)
    targets = {
        "tags": tags.where(torch.arange(4) < lengths[..., None], -100),
        "parts": torch.tensor([[0, 1, -100], [1, 1, 0], [0, -100, -100]]),
        "yes": torch.tensor([0.0, 1.0, 1.0]),
    }
    models = [model(MultiTaskModule), model(Whole)]
    for made_model in models:
        fit(
            made_model,
            [CAGrad(0.4), TaskSAM(0.05)],
            DataLoader([(inputs, targets)] * 3, batch_size=None),
        )
    assert_close(*models, 1e-9)
    params = dict(models[0].named_parameters())
    shared = models[0].engine.partition.shared(list(params.values()))
    found = {n for n, p in params.items() if any(p is q for q in shared)}
    assert found == {n for n in params if n.startswith("encoder.")}


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_the_second_pass_drops_what_the_clean_pass_has_dropped(kind) -> None:
    """So a tiny radius changes next to nothing."""
    given = {"dropout": 0.5, "token_tasks": ["tags"], "layers": 2}
    models = [module(made(kind, **given)) for _ in range(2)]
    for model, rho in zip(models, (0.0, 1e-7), strict=True):
        torch.manual_seed(7)
        fit(model, [TaskSAM(rho)] if rho else [], samples(1))
    assert_close(*models, 1e-5)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_resumed_it_is_the_same_to_the_last_bit(kind, tmp_path) -> None:
    def model() -> MultiTaskModule:
        return module(made(kind, token_tasks=["tags"]))

    def method() -> list[Any]:
        return [CAGrad(), TaskSAM(0.05)]

    whole, rest = model(), model()
    fit(whole, method(), samples(2), max_epochs=2)
    fit(model(), method(), samples(2)).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, method(), samples(2), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_identical(whole, rest)


def test_the_tensors_of_the_features_are_the_ends_of_the_graph() -> None:
    encoder = made("lstm", token_tasks=["tags"])
    features = encoder(batch(rows()))
    tensors = [t for t in pytree.tree_leaves(features) if t is not None]
    assert len(tensors) == 2
    assert reached_parameters(tensors) == set(encoder.parameters())
    cut = pytree.tree_map_only(Tensor, Tensor.detach, features)
    assert isinstance(cut, SequenceFeatures)
    assert torch.equal(cut["tags"], features["tags"])
    assert list(features) == ["tags"]
    assert len(features) == 1


# What is refused.

BAD_INPUTS = [
    ({"tokens": torch.zeros(2, 3)}, "'tokens' must be integers, got torch.float32"),
    ({"tokens": torch.zeros(2, 3, 1).long()}, "must have the shape \\[n, longest\\], got"),
    ({"tokens": torch.full((2, 3), WORDS)}, "'tokens' must be in \\[0, 11\\).*got 11"),
    ({"tokens": torch.full((2, 3), -1)}, "'tokens' must be in \\[0, 11\\).*got -1"),
    ({"lengths": torch.tensor([4, 1])}, "'lengths' must be in \\[0, 3\\].*got 4"),
    ({"lengths": torch.tensor([1, -1])}, "'lengths' must be in \\[0, 3\\].*got -1"),
    ({"lengths": torch.tensor([1])}, "'lengths' must be integers of the shape \\[2\\]"),
    ({"lengths": torch.tensor([1.0, 2.0])}, "'lengths' must be integers .* got torch.float32"),
    ({"tokens": torch.zeros(0, 3).long(), "lengths": torch.zeros(0).long()}, "at least one seq"),
]


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs_are_refused(kind, change, message) -> None:
    good = {"tokens": torch.zeros(2, 3).long(), "lengths": torch.tensor([3, 1])}
    with pytest.raises(ValueError, match=message):
        made(kind)({**good, **change})


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_inputs_of_another_form_are_refused(kind) -> None:
    tokens = torch.zeros(2, 3).long()
    for given, got in ((tokens, "Tensor"), ({"tokens": tokens}, "\\['tokens'\\]")):
        with pytest.raises(ValueError, match=f"mapping with .*'tokens', 'lengths'.*, got {got}"):
            made(kind)(given)


def test_bad_vectors_and_parts_are_refused() -> None:
    lengths = torch.tensor([3, 1])
    for x, message in (
        (torch.zeros(2, 3, 4), "must have the shape \\[n, longest, 2\\], got \\[2, 3, 4\\]"),
        (torch.zeros(2, 3, 2).long(), "must be floating-point numbers, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            made("lstm", in_features=2)({"vectors": x, "lengths": lengths})
    words = made("lstm")
    encoder = HierarchicalEncoder(words, made("gru", in_features=8))
    good = {"tokens": torch.zeros(2, 2, 3).long(), "lengths": torch.ones(2, 2).long()}
    for change, message in (
        ({"lengths": lengths}, "'lengths' must have the shape \\[n, parts\\]"),
        ({"tokens": torch.zeros(2, 3).long()}, "must have the shape \\[n, parts, longest"),
        ({"lengths": torch.full((2, 2), 4)}, "'lengths' must be in \\[0, 3\\].*got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder({**good, **change})
    with pytest.raises(
        ValueError, match="`outer` must read vectors of `inner`, so `in_features=8`"
    ):
        HierarchicalEncoder(words, made("lstm", in_features=3))
    with pytest.raises(ValueError, match="`inner` must have no `token_tasks`"):
        HierarchicalEncoder(made("lstm", token_tasks=["a"]), made("lstm", in_features=8))
    with pytest.raises(ValueError, match="in one of `token_tasks` and `part_tasks`"):
        HierarchicalEncoder(words, made("lstm", in_features=8), ["a"], ["a"])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("lstm", {"in_features": None, "vocabulary": None}, "One of `vocabulary`"),
        ("lstm", {"kind": "rnn"}, "`kind` must be 'lstm' or 'gru', got 'rnn'"),
        ("lstm", {"pooling": "mark"}, "`pooling` must be 'last' or 'mean' or 'max'"),
        ("lstm", {"units": 0}, "`units` must be at least 1, got 0"),
        ("lstm", {"dropout": 1.0}, "`dropout` must be in \\[0, 1\\), got 1.0"),
        ("lstm", {"token_tasks": "tags"}, "`token_tasks` must be a list of different names"),
        ("transformer", {"features": 7}, "`features` must be a multiple of `heads`=2, got 7"),
        ("transformer", {"features": 7, "heads": 1, "positions": "sinusoidal"}, "must be even"),
        ("transformer", {"positions": "none"}, "`positions` must be 'learned' or 'sinusoidal'"),
    ],
)
def test_bad_arguments_are_refused(kind, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL[kind](**{"vocabulary": WORDS, **given})


def test_sequences_beyond_the_learned_positions_are_refused() -> None:
    encoder = made("transformer", longest=3)
    encoder(batch([torch.ones(3).long()]))
    with pytest.raises(ValueError, match="at most `longest`=3 tokens, got 4"):
        encoder(batch([torch.ones(4).long()]))


def test_a_tagging_task_that_the_encoder_does_not_know_is_told_what_to_do() -> None:
    model = module(made("lstm", token_tasks=["tag"]))  # misspelt
    with pytest.raises(ValueError, match="Name the task in `token_tasks` of the encoder"):
        fit(model, [], samples(1))


def test_in_half_precision() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in SMALL:
            encoder = made(kind, token_tasks=["tags"]).float()
            features = encoder(batch(rows()))
            assert features["tags"].isfinite().all()


def test_binary_heads_on_the_vector() -> None:
    encoder = made("gru")
    model = MultiTaskModule(encoder, [BinaryTask("yes", 8)], sgd).double()
    assert model(batch(rows()))["yes"].shape == (5,)
