"""Every aggregator in a Trainer, with TaskSAM: resumed bit for bit, and learning something real."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM
from lightning_flatmtl import aggregators as a
from tests.aggregators.specs import SPECS, Spec
from tests.helpers import Pairs, assert_identical, fit

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
TASKS = ("a", "b", "c")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not scale with the gradients")


def loader() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, dtype=torch.float64, generator=g)
    targets = {t: torch.randint(0, 3, (24,), generator=g) for t in TASKS}
    return DataLoader(Pairs(x, targets), batch_size=8)


def module(tasks: tuple[str, ...] = TASKS) -> MultiTaskModule:
    torch.manual_seed(1)
    return MultiTaskModule(
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh()),
        [ClassificationTask(t, 8, 3) for t in tasks],
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    ).double()


@ALL
def test_resumes_bit_for_bit(spec: Spec, tmp_path: Path) -> None:
    unbroken, broken, resumed = module(), module(), module()
    fit(unbroken, [spec.make(), TaskSAM(0.05)], loader(), max_epochs=4)
    trainer = fit(broken, [spec.make(), TaskSAM(0.05)], loader(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    callbacks = [spec.make(), TaskSAM(0.05)]
    fit(resumed, callbacks, loader(), max_epochs=4, ckpt_path=tmp_path / "two.ckpt")
    assert_identical(resumed, unbroken)


@pytest.mark.parametrize("name", ["GradNorm", "GradVac", "PCGrad"])
def test_a_changed_task_list_is_refused(name: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="one")
    fit(module(), [SPECS[name].make(), keep], loader(), enable_checkpointing=True)
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]
    aggregator = SPECS[name].make()
    aggregator._tasks = ("a", "b")
    with pytest.raises(ValueError, match=r"tasks \['a', 'b', 'c'\], got the tasks \['a', 'b'\]"):
        aggregator.load_state_dict(state[aggregator.state_key])


@ALL
def test_an_absent_task_disturbs_nothing(spec: Spec) -> None:
    g = torch.Generator().manual_seed(0)

    def batch(tasks: tuple[str, ...]):
        x = torch.randn(8, 6, dtype=torch.float64, generator=g)
        return x, {t: torch.randint(0, 3, (8,), generator=g) for t in tasks}

    batches = [batch(t) for t in (TASKS, ("a",), ("b", "c"), TASKS, ("c",), TASKS)]
    model = module()
    before = copy.deepcopy(model.state_dict())
    fit(model, [spec.make(), TaskSAM(0.05)], DataLoader(batches, batch_size=None))
    after = model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    assert any(not torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("method", [a.NashMTL, a.FairGrad])
def test_a_lost_scale_is_told(method: type) -> None:
    with pytest.warns(UserWarning, match=rf"Use {method.__name__}\(normalize=True\)"):
        fit(module(), [method(), TaskSAM(0.05)], loader())


LEARNING = {
    "MGDA": a.MGDA,
    "PCGrad": a.PCGrad,
    "CAGrad": a.CAGrad,
    "IMTL": a.IMTL,
    "NashMTL": lambda: a.NashMTL(max_norm=1.0, normalize=True),
    "FairGrad": lambda: a.FairGrad(normalize=True),
    "UPGrad": a.UPGrad,
    "GradDrop": a.GradDrop,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_learns_handwritten_digits(name: str) -> None:
    from lightning_flatmtl.data import MultiDigits
    from lightning_flatmtl.models import ConvEncoder

    torch.manual_seed(0)
    model = MultiTaskModule(
        ConvEncoder(features=64),
        [ClassificationTask(side, 64, 10) for side in ("left", "right")],
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
    )
    data = MultiDigits(train_pairs=1500, label_noise=0.1)
    callbacks = [LEARNING[name](), TaskSAM(1.0, adaptive=True)]
    trainer = fit(model, callbacks, data, max_epochs=6)
    (metrics,) = trainer.test(model, data, verbose=False)
    for side in ("left", "right"):
        assert metrics[f"test/{side}/accuracy"] > 0.6  # chance is 0.1
