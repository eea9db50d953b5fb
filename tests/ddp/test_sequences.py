"""Encoders of sequences: batches padded differently in every process train as one."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaggingTask, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import RecurrentEncoder, SequenceTransformer
from tests.ddp.cases import case
from tests.ddp.net import Batches, sgd
from tests.ddp.training import copies, deviation, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

ENCODERS: dict[str, Any] = {
    "recurrent": lambda **given: RecurrentEncoder(embedding=3, units=4, **given),
    "transformer": lambda **given: SequenceTransformer(features=8, heads=2, dropout=0.0, **given),
}
LENGTHS = [[1, 2, 0, 2, 1, 3, 7, 5, 6, 2, 4, 9], [2, 3, 3, 1, 1, 2, 1, 0, 0, 1, 1, 1]]
METHODS: dict[str, Any] = {"plain": list, "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)]}


def part(place: Place, lengths: list[int], seed: int) -> Any:
    """This process's sequences of a batch of twelve, padded to its own longest one."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 11, (n,), generator=g) for n in lengths]
    tags = [torch.randint(0, 3, (n,), generator=g) for n in lengths]
    kinds = torch.randint(0, 2, (len(rows),), generator=g)
    size = len(rows) // place.size
    mine = slice(place.rank * size, (place.rank + 1) * size)

    def padded(found: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(found[mine], True, value)

    inputs = {"tokens": padded(rows, 0), "lengths": torch.tensor(lengths[mine])}
    return inputs, {"tags": padded(tags, -100), "kind": kinds[mine]}


def run(place: Place, encoder: str, method: str) -> dict[str, Any]:
    torch.manual_seed(0)
    trunk = ENCODERS[encoder](vocabulary=11, token_tasks=["tags"])
    tasks = [TaggingTask("tags", 8, 3), ClassificationTask("kind", 8, 2)]
    net = MultiTaskModule(trunk, tasks, sgd).double()
    made = trainer(place, METHODS[method]())
    batches = [part(place, lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    made.fit(net, Batches(batches))
    metrics = {name: float(value) for name, value in made.callback_metrics.items()}
    return {"params": copies(net.named_parameters()), "metrics": metrics}


CASES = [(encoder, method) for encoder in ENCODERS for method in METHODS]
for _encoder, _method in CASES:
    case(f"sequences/{_encoder}/{_method}", partial(run, encoder=_encoder, method=_method))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("encoder", "method"), CASES)
def test_as_one_process(runs: Any, encoder: str, method: str, size: int) -> None:
    (one,) = runs(1, f"sequences/{encoder}/{method}")
    for found in runs(size, f"sequences/{encoder}/{method}"):
        assert deviation(found["params"], one["params"]) < 1e-10
        for name in ("train/tags/f1", "train/tags/accuracy", "train/kind/accuracy"):
            assert found["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6)
