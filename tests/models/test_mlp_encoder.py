import pytest
import torch
from torch import nn

from lightning_flatmtl.models import MLPEncoder


def inputs(rows: int = 6, numeric: int = 3, sizes=(5, 2)) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    categorical = [torch.randint(0, size, (rows,), generator=g) for size in sizes]
    return {
        "numeric": torch.randn(rows, numeric, generator=g),
        "categorical": torch.stack(categorical, 1),
    }


def test_it_is_a_perceptron_on_numbers_and_a_table_per_column() -> None:
    encoder = MLPEncoder(numeric=3, categories=[5, 2], embedding=4, widths=[7, 6])
    first, second = encoder.table.weight[:5], encoder.table.weight[5:]
    x = inputs()
    columns = [first[x["categorical"][:, 0]], second[x["categorical"][:, 1]], x["numeric"]]
    h = torch.cat(columns, 1)
    for layer in (m for m in encoder.modules() if isinstance(m, nn.Linear)):
        h = torch.relu(h @ layer.weight.T + layer.bias)
    torch.testing.assert_close(encoder(x), h)
    assert encoder(x).shape == (6, encoder.features)


def test_one_kind_of_column_is_enough() -> None:
    x = inputs()
    assert MLPEncoder(3, widths=[4])({"numeric": x["numeric"]}).shape == (6, 4)
    assert MLPEncoder(0, [5, 2], widths=[4])({"categorical": x["categorical"]}).shape == (6, 4)


def test_dropout_and_batch_norm() -> None:
    encoder = MLPEncoder(3, [5, 2], widths=[16, 8], dropout=0.5, batch_norm=True)
    kinds = [type(layer) for block in encoder.blocks for layer in block]
    assert kinds == 2 * [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    x = inputs()
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    plain = MLPEncoder(3, [5, 2], widths=[16, 8])
    assert {type(layer) for block in plain.blocks for layer in block} == {nn.Linear, nn.ReLU}


def test_every_parameter_gets_a_gradient() -> None:
    encoder = MLPEncoder(3, [5, 2], embedding=4, widths=[16, 8])
    encoder(inputs(rows=64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_state_has_weights_only() -> None:
    encoder = MLPEncoder(3, [5, 2])
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numeric": -1}, "`numeric` must be at least 0, got -1"),
        ({"numeric": 0}, "must name at least one column"),
        ({"numeric": 1, "categories": [3, 0]}, "`categories` must be at least 1, got 0"),
        ({"numeric": 1, "embedding": 0}, "`embedding` must be at least 1, got 0"),
        ({"numeric": 1, "widths": []}, "`widths` must name at least one block"),
        ({"numeric": 1, "widths": [4, 0]}, "`widths` must be at least 1, got 0"),
        ({"numeric": 1, "dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"numeric": 1, "dropout": float("nan")}, r"`dropout` must be in \[0, 1\), got nan"),
    ],
)
def test_bad_sizes_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        MLPEncoder(**arguments)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ([5, 2], {"categorical": torch.tensor([[4, 1], [0, 2]])}, "column 1 has a table of 2.*2"),
        ([5, 2], {"categorical": torch.tensor([[4, 1], [-1, 1]])}, "column 0 .*got index -1"),
        ([5, 2, 2], {}, r"\[batch, 3\], as `categories` says, got \[6, 2\]"),
        ([5, 2], {"numeric": torch.zeros(6, 4)}, r"\[batch, 3\], as `numeric` says"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(sizes, change, message) -> None:
    encoder = MLPEncoder(3, sizes)
    with pytest.raises(ValueError, match=message):
        encoder({**inputs(), **change})


@pytest.mark.parametrize("given", [torch.zeros(6, 3), {"numeric": torch.zeros(6, 3)}])
def test_inputs_of_another_form_are_refused(given) -> None:
    with pytest.raises(ValueError, match="must be a mapping with 'categorical', got"):
        MLPEncoder(3, [5, 2])(given)
