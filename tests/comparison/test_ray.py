"""A comparison on a real Ray cluster of two nodes on this machine; one of them is killed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_flatmtl.comparison.folder import RunFolder
from tests.comparison import ray_cluster as nodes

pytest.importorskip("ray", reason='needs `pip install "lightning-flatmtl[ray]"`')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PROJECT = '''
"""Two tasks of which a batch takes its time, so that there is a middle to be killed in."""
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        self.trunk = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1))
        self.a, self.b = torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)

    def losses(self, batch):
        x, a, b = batch
        z = self.trunk(x)
        return {"a": mse_loss(self.a(z), a), "b": mse_loss(self.b(z), b)}

    def training_step(self, batch, index):
        time.sleep(self.pause)
        losses = self.losses(batch)
        return {"loss": sum(losses.values()), "losses": losses}

    def test_step(self, batch, index):
        for name, loss in self.losses(batch).items():
            self.log(f"test/{name}/loss", loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Data(LightningDataModule):
    def setup(self, stage):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(7))
        self.pairs = TensorDataset(x, x[:, :1] - x[:, 1:2], x[:, 2:3] + x[:, 1:2])

    def train_dataloader(self):
        return DataLoader(self.pairs, 8, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.pairs, 64)
'''
BASE = """
seed_everything: 0
trainer: {max_epochs: 12, accelerator: cpu, logger: false, enable_model_summary: false}
model: {class_path: project.Model, init_args: {pause: 0.15}}
data: {class_path: project.Data}
"""
COMPARE = """
config: base.yaml
methods:
  LS: []
  CAGrad: [CAGrad]
seeds: [0, 1]
tasks: [a, b]
resources: {cpu: 1, gpu: 0}
"""
MEASURED = ("seconds_per_step", "peak_memory_mib")


@pytest.fixture(scope="module")
def cluster() -> Iterator[nodes.Cluster]:
    with nodes.cluster() as started:
        yield started


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with modules of its own, which the nodes are to find."""
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "compare.yaml").write_text(COMPARE)
    return tmp_path


def start(folder: Path, output: str, *arguments: str, address: str = "") -> subprocess.Popen[bytes]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with (folder / f"{output}.txt").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "lightning_flatmtl", "compare"),
                *("--config", "compare.yaml", "--output", output, *arguments),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_ADDRESS": address},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def folders(output: Path) -> list[RunFolder]:
    return [RunFolder(path) for path in sorted((output / "runs").glob("*"))]


def training(output: Path, epoch: int) -> dict[int, RunFolder]:
    """The processes of runs that have so many epochs."""
    said = [(folder.progress, folder) for folder in folders(output)]
    return {p["process"]: folder for p, folder in said if p and p["epoch"] >= epoch}


def group_of_node(training: int) -> int:
    """The process group of the node that a training is on: parent of its worker is the raylet."""
    known = nodes.processes()
    worker = known[training][0]
    return known[known[worker][0]][1]


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def test_interrupted_tasks_and_their_processes_end(cluster: nodes.Cluster, project: Path) -> None:
    output = project / "stopped"
    process = start(project, "stopped", "--launcher", "ray", address=cluster.address)
    try:
        nodes.until(lambda: training(output, 1) or process.poll() is not None, 300)
        (pid,) = training(output, 1)  # the cluster has one CPU
        begun = [folder for folder in folders(output) if (folder.path / "node.json").exists()]
        assert len(begun) == 1
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(60)

    said = (project / "stopped.txt").read_text()
    assert status == 130, said
    assert "the same command goes on" in said
    assert "(3 queued, 1 running" in said
    assert not nodes.alive(pid)
    assert not any(folder.claimed for folder in folders(output))
    # What waited for its turn did not take the free place.
    after = [folder for folder in folders(output) if (folder.path / "node.json").exists()]
    assert [folder.path for folder in after] == [folder.path for folder in begun]
    assert {row["status"] for row in rows(output)} == {"queued"}


def test_runs_of_a_killed_node_are_done_on_another_one(
    cluster: nodes.Cluster, project: Path
) -> None:
    second = cluster.add_node()
    output = project / "ray"
    process = start(project, "ray", "--launcher", "ray", address=cluster.address)
    try:
        # In the middle: one run on each node.
        def on_second() -> list[int]:
            return [pid for pid in training(output, 2) if group_of_node(pid) == second]

        nodes.until(lambda: on_second() or process.poll() is not None, 300)
        (killed,) = on_second()
        run = training(output, 2)[killed]
        before = json.loads((run.path / "node.json").read_text())
        assert run.resume.is_file()
        assert run.result is None
        nodes.end([pid for pid in nodes.members(second) if pid != killed])
        # Nobody has ended the training itself: it has to see that its worker is gone.
        nodes.until(lambda: not nodes.alive(killed), 30)
        status = process.wait(400)
    finally:
        process.kill()
        process.wait()

    said = (project / "ray.txt").read_text()
    assert status == 0, said
    after = json.loads((run.path / "node.json").read_text())
    assert after["node"] != before["node"]
    assert {folder.result["epochs"] for folder in folders(output)} == {12}
    # It did not begin anew: the log of the second try tells where it went on.
    assert "Restored all states from the checkpoint" in run.log.read_text()
    assert all(int(count) <= 2 for count in re.findall(r"(\d+) running", said))
    assert len(re.findall(r"seed \d: running", said)) == 5, said  # one of them twice

    local = start(project, "local", "--workers", "2")
    assert local.wait(400) == 0, (project / "local.txt").read_text()
    assert rows(output) == rows(project / "local")
    assert {row["status"] for row in rows(output)} == {"done"}


def test_a_run_that_fails_by_itself_is_not_tried_again(
    cluster: nodes.Cluster, project: Path
) -> None:
    (project / "compare.yaml").write_text(COMPARE.replace("[0, 1]", "[0]"))
    failing = PROJECT.replace("time.sleep(self.pause)", "raise OSError('no such data')")
    (project / "project.py").write_text(failing)
    process = start(project, "failed", "--only", "LS", "--launcher", "ray", address=cluster.address)
    assert process.wait(300) == 1
    (row,) = rows(project / "failed")
    assert (row["status"], row["error"]) == ("failed", "OSError: no such data")
    (folder,) = folders(project / "failed")
    assert not folder.log.with_name("log.before.txt").exists()
