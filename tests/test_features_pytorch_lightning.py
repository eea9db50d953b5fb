"""Modules and Trainers of the package ``pytorch_lightning``, with our callbacks.

It holds a second copy of Lightning's classes. A taken-over module may come from either.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.takeover import TakeOver
from tests.features import SUMS, Callbacks, Existing, Steps, active, loader
from tests.helpers import assert_close, assert_identical, module, sgd
from tests.helpers import trainer as unified_trainer
from tests.test_parity import onecycle, plateau

ptl = pytest.importorskip("pytorch_lightning")

pytestmark = pytest.mark.filterwarnings("ignore:.*weights_only")


class Defaults:
    def configure_optimizers(self):
        return sgd(self.parameters())


class Unified(Defaults, Existing):
    """Of ``lightning.pytorch``."""


class Legacy(Defaults, Steps, ptl.LightningModule):
    """The same module of ``pytorch_lightning``."""


def fit(
    kind: type, callbacks: Callbacks, configure: Any = None, ckpt_path: Any = None, **settings: Any
) -> Any:
    """Train a module in the Trainer of its own package; the Trainer."""
    quiet = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    package = ptl.Trainer if issubclass(kind, Legacy) else None
    body = {} if configure is None else {"configure_optimizers": configure}
    model = type("Made", (kind,), body)()
    if package is None:
        trainer = unified_trainer(callbacks, **{"max_epochs": 2, **settings})
    else:
        trainer = ptl.Trainer(callbacks=callbacks, **{**quiet, **settings})
    trainer.fit(model, loader(), loader(16, 1), ckpt_path=ckpt_path)
    assert not isinstance(vars(model).get("training_step"), TakeOver)
    return trainer


def assert_alike(first: Any, second: Any) -> None:
    assert_close(first.lightning_module, second.lightning_module, 1e-12)
    assert first.global_step == second.global_step
    assert first.callback_metrics.keys() == second.callback_metrics.keys()
    for name, value in first.callback_metrics.items():
        torch.testing.assert_close(value, second.callback_metrics[name], rtol=1e-12, atol=0.0)


ROWS = {
    "plain": {},
    "clip norm": {"gradient_clip_val": 0.1},
    "clip value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 2},
    "OneCycleLR": {"configure": onecycle},
    "ReduceLROnPlateau": {"configure": plateau, "max_epochs": 4},
    "64-true": {"precision": "64-true"},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
}


@pytest.mark.parametrize("row", ROWS)
def test_rows(row: str) -> None:
    plain = fit(Legacy, [], **ROWS[row])
    for path in SUMS.values():
        assert_alike(fit(Legacy, path(), **ROWS[row]), plain)
    assert_alike(plain, fit(Unified, [], **ROWS[row]))
    ours, unified = (fit(kind, active(), **ROWS[row]) for kind in (Legacy, Unified))
    assert_identical(ours.lightning_module, unified.lightning_module)
    assert_alike(ours, unified)
    assert not torch.equal(ours.lightning_module.encoder[0].weight, Legacy().encoder[0].weight)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("average", [False, True])
def test_checkpoint_and_resume(tmp_path: Path, average: bool) -> None:
    def company() -> list[Any]:
        return [ptl.callbacks.EMAWeightAveraging(decay=0.9)] if average else []

    checkpoints = ptl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    settings = {"max_epochs": 4, "configure": onecycle, "accumulate_grad_batches": 2}
    whole = fit(Legacy, [*active(), *company(), checkpoints], enable_checkpointing=True, **settings)
    path = tmp_path / "epoch=1.ckpt"
    resumed = fit(Legacy, [*active(), *company()], ckpt_path=path, **settings)
    assert_identical(resumed.lightning_module, whole.lightning_module)
    assert resumed.global_step == whole.global_step


def test_stochastic_weight_averaging() -> None:
    def averaging() -> Any:
        return ptl.callbacks.StochasticWeightAveraging(0.05, 0.5, annealing_epochs=1)

    ours = fit(Legacy, [*SUMS["gradients"](), averaging()], max_epochs=4)
    assert_alike(ours, fit(Legacy, [averaging()], max_epochs=4))


def test_two_aggregators_are_refused() -> None:
    misuse = MisconfigurationException
    with pytest.raises(misuse, match="at most one Aggregator"):
        fit(Legacy, [CAGrad(), *SUMS["losses"]()])


def test_a_multi_task_module_is_of_the_other_package() -> None:
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        ptl.Trainer(logger=False, accelerator="cpu").fit(module(), loader())
