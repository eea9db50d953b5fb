"""TaskAverage logs the mean over the tasks, and refuses what it cannot average."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatmtl import MultiTaskModule, Task
from lightning_flatmtl.callbacks import TaskAverage
from lightning_flatmtl.metrics import BrierScore, ErrorRate

TASKS = ("a", "b", "c")


def loader(seed: int, missing: str | None = None) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(10, 4, generator=g), torch.randint(-1, 2, (10, 3), generator=g)
    if missing is not None:
        y[:, TASKS.index(missing)] = -1

    def collate(rows):
        inputs, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        return inputs, {task: labels[:, k] for k, task in enumerate(TASKS)}

    return DataLoader(TensorDataset(x, y), batch_size=4, collate_fn=collate)


def module(lacking: str | None = None) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = [
        Task(
            task,
            nn.Linear(4, 2),
            nn.CrossEntropyLoss(),
            {"error_rate": ErrorRate()} | ({} if task == lacking else {"brier": BrierScore()}),
            missing=-1,
        )
        for task in TASKS
    ]
    optimizer = torch.optim.SGD
    return MultiTaskModule(nn.Linear(4, 4), tasks, lambda params: optimizer(params, lr=0.1))


def logged(tmp_path, callback, val, net=None, fit=True):
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    net = net or module()
    if fit:
        trainer.fit(net, loader(0), val)
    else:
        trainer.validate(net, val, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("fit", [True, False])
def test_the_mean_is_that_of_what_is_logged_of_the_tasks(tmp_path, fit) -> None:
    found = logged(tmp_path, TaskAverage(), loader(1), fit=fit)
    for name in ("error_rate", "brier"):
        of_tasks = [found[f"val/{task}/{name}"] for task in TASKS]
        assert found[f"val/average/{name}"] == pytest.approx(sum(of_tasks) / 3)
        assert len(set(of_tasks)) > 1


def test_only_what_is_asked_for(tmp_path) -> None:
    found = logged(tmp_path, TaskAverage(["error_rate"]), loader(1))
    assert [name for name in found if "average" in name] == ["val/average/error_rate"]


def test_a_metric_that_one_task_lacks_is_not_averaged(tmp_path) -> None:
    found = logged(tmp_path, TaskAverage(), loader(1), module(lacking="b"))
    assert [name for name in found if "average" in name] == ["val/average/error_rate"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_task_without_labels_is_left_out(tmp_path) -> None:
    found = logged(tmp_path, TaskAverage(["error_rate"]), loader(1, missing="c"))
    of_tasks = [found[f"val/{task}/error_rate"] for task in ("a", "b")]
    assert found["val/average/error_rate"] == pytest.approx(sum(of_tasks) / 2)


def test_every_data_loader_has_its_own(tmp_path) -> None:
    found = logged(tmp_path, TaskAverage(["error_rate"]), [loader(1), loader(2)])
    for index in (0, 1):
        of_tasks = [found[f"val/{task}/error_rate/dataloader_idx_{index}"] for task in TASKS]
        mean = found[f"val/average/error_rate/dataloader_idx_{index}"]
        assert mean == pytest.approx(sum(of_tasks) / 3)


def test_what_cannot_be_averaged_is_refused_before_the_first_batch(tmp_path) -> None:
    with pytest.raises(MisconfigurationException, match="got 'error'. Did you mean 'error_rate'"):
        logged(tmp_path, TaskAverage(["error"]), loader(1))
    with pytest.raises(MisconfigurationException, match="got 'brier'. All tasks have: error_rate"):
        logged(tmp_path, TaskAverage(["brier"]), loader(1), module(lacking="b"))

    class Other(pl.LightningModule):
        def training_step(self, batch, _):
            raise AssertionError

        def validation_step(self, batch, _):
            raise AssertionError

        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match="needs a MultiTaskModule, got Other"):
        logged(tmp_path, TaskAverage(), loader(1), Other(), fit=False)
