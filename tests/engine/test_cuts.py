"""Where a graph is cut."""

import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.parameters.cuts import pieces_of
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters


def linear(n: int = 30) -> nn.Linear:
    return nn.Linear(n, n, bias=False)


def groups(losses: list[Tensor], params: list[Tensor]) -> list[tuple[tuple[int, ...], ...]]:
    """The parameters of the pieces; what every answer must satisfy is checked on the way."""
    shared = FlatParameters(params)
    pieces = pieces_of(losses, shared)
    found = [tuple(tuple(sorted(group)) for group in piece.groups) for piece in pieces]
    if pieces:
        each = [i for piece in found for group in piece for i in group]
        assert sorted(each) == list(range(len(params)))
        assert [bool(piece.below) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return found


def losses_of(features: Tensor, tasks: int = 8) -> list[Tensor]:
    return [(features * i).square().sum() for i in range(1, tasks + 1)]


def test_a_chain_is_cut_at_every_layer() -> None:
    a, b, c = linear(), linear(), linear()
    features = c(b(a(torch.ones(2, 30)).tanh()).tanh())
    params = [a.weight, b.weight, c.weight]
    assert groups(losses_of(features), params) == [((),), ((2,),), ((1,),), ((0,),)]


def test_few_tasks_need_few_pieces() -> None:
    layers = [linear() for _ in range(6)]
    features = nn.Sequential(*layers)(torch.ones(2, 30))
    params = [layer.weight for layer in layers]
    assert len(groups(losses_of(features, 2), params)) == 3
    assert [len(piece[0]) for piece in groups(losses_of(features, 40), params)] == [0] + [1] * 6


def test_a_residual_block_is_walked_twice_in_place_of_cut() -> None:
    a, b, c = linear(), linear(), linear()
    entered = a(torch.ones(2, 30))
    features = entered + c(b(entered).tanh())
    params = [a.weight, b.weight, c.weight]
    assert groups(losses_of(features), params) == [((),), ((2,), (1,)), ((0,),)]


def test_tied_weights_forbid_a_cut_between_their_uses() -> None:
    a, b, c = linear(), linear(), linear()
    features = b(a(b(c(torch.ones(2, 30)).tanh()).tanh()).tanh())
    params = [a.weight, b.weight, c.weight]
    *above, below = groups(losses_of(features), params)
    assert below == ((2,),)
    assert sorted(i for piece in above for group in piece for i in group) == [0, 1]


def test_what_heads_read_on_the_way_forbids_cuts_above() -> None:
    a, b, c = linear(), linear(), linear()
    first = a(torch.ones(2, 30)).tanh()
    second = b(first)
    losses = losses_of(c(second), 4) + losses_of(second, 4)  # two depths
    pieces = groups(losses, [a.weight, b.weight, c.weight])
    assert pieces[0] == ((2,),)
    assert pieces[1:] == [((1,),), ((0,),)]


def test_features_larger_than_the_parameters_are_no_cut() -> None:
    layer = linear()
    features = layer(torch.ones(500, 30)).tanh()
    assert groups(losses_of(features), [layer.weight]) == []


def test_of_two_towers_the_higher_one_is_cut() -> None:
    a, b, c, d = (linear() for _ in range(4))
    x = torch.ones(2, 30)
    features = c(b(a(x))) * d(x)
    pieces = groups(losses_of(features, 40), [p.weight for p in (a, b, c, d)])
    assert [p for p in pieces if p != ((3,),)][-2:] == [((1,),), ((0,),)]


def test_parameters_used_at_every_step_of_many_are_found_quickly() -> None:
    cell = linear()
    state = torch.ones(2, 30)
    for _ in range(2000):
        state = cell(state).tanh()
    assert groups(losses_of(state), [cell.weight]) == []
