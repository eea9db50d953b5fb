"""What the Ray launcher tells of its tasks; Ray itself is played here, and is real in test_ray."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_flatmtl import compare
from lightning_flatmtl.comparison.display import Display
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.jobs import Job, State
from lightning_flatmtl.comparison.launchers import on_node
from lightning_flatmtl.comparison.launchers import ray as launchers_ray
from lightning_flatmtl.comparison.launchers.ray import RayLauncher
from lightning_flatmtl.comparison.plan import Run
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.settings import Resources
from lightning_flatmtl.comparison.work import work_off


class RayError(Exception):
    pass


class TaskCancelledError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a traceback of many lines\n{cause}")
        self.cause = cause


class FakeRay:
    """A cluster whose nodes and tasks do what a test says."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.listed = [
            {"NodeID": f"node{i}", "Alive": True, "Resources": resources}
            for i, resources in enumerate(nodes)
        ]
        self.ended: dict[int, Any] = {}
        self.tasks: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self.reserved: dict[str, Any] = {}
        self.open = False
        self.exceptions = SimpleNamespace(
            RayError=RayError, TaskCancelledError=TaskCancelledError, RayTaskError=RayTaskError
        )
        self.cloudpickle = SimpleNamespace(register_pickle_by_value=lambda module: None)

    def is_initialized(self) -> bool:
        return self.open

    def init(self, **given: Any) -> None:
        if not self.listed:
            raise ConnectionError("Could not find any running Ray instance.")
        self.open = True

    def shutdown(self) -> None:
        self.open = False

    def nodes(self) -> list[dict[str, Any]]:
        return self.listed

    def remote(self, **reserved: Any) -> Any:
        self.reserved = reserved

        def submit(**given: Any) -> int:
            self.tasks.append(given)
            return len(self.tasks) - 1

        return lambda function: SimpleNamespace(
            options=lambda **names: SimpleNamespace(remote=submit)
        )

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [t for t in tasks if t in self.ended], [t for t in tasks if t not in self.ended]

    def get(self, task: int) -> int:
        ended = self.ended[task]
        if isinstance(ended, Exception):
            raise ended
        return int(ended)

    def cancel(self, task: int) -> None:
        self.cancelled.append(task)
        self.ended[task] = TaskCancelledError()

    # What a test says.

    def begin(self, task: int, node: str) -> None:
        given = self.tasks[task]
        note = {"submission": given["submission"], "node": node}
        Path(given["folder"], on_node.NOTE).write_text(json.dumps(note))

    def lose(self, node: str) -> None:
        next(each for each in self.listed if each["NodeID"] == node)["Alive"] = False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return play(monkeypatch, FakeRay({"CPU": 4.0}, {"CPU": 4.0}))


def play(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> FakeRay:
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launchers_ray, "_LOOK_EVERY", -1.0)
    return fake


def make_job(tmp_path: Path, name: str = "run") -> Job:
    run = Run(name, 0, {"trainer": {}}, Selection())
    folder = RunFolder(tmp_path / name)
    folder.prepare(run)
    return Job(run, folder)


def started(tmp_path: Path) -> Job:
    job = make_job(tmp_path)
    job.start(RayLauncher(Resources()).start(job.folder))
    return job


COMPARISON = {
    "methods": {"LS": []},
    "resources": {"cpu": 1, "gpu": 0},
}


def small(tmp_path: Path) -> dict[str, Any]:
    base = {
        "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
        "trainer": {"max_epochs": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return {**COMPARISON, "config": str(tmp_path / "base.yaml"), "output": str(tmp_path / "out")}


# Refused before anything starts.


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[ray\]"'):
        compare(small(tmp_path), launcher="ray")
    assert not (tmp_path / "out").exists()


def test_the_local_launcher_does_not_import_ray() -> None:
    code = (
        "import sys, lightning_flatmtl.cli as cli; "
        "assert not any(name.split('.')[0] == 'ray' for name in sys.modules); "
        "assert 'lightning_flatmtl.comparison.launchers.ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_cluster_it_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, FakeRay())
    with pytest.raises(ConnectionError, match="ray start --head"):
        compare(small(tmp_path), launcher="ray")
    assert not (tmp_path / "out").exists()


def test_an_address_where_nothing_answers_is_refused_at_once(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="nothing answers"):
            RayLauncher(Resources())
        assert not ray.open
        free.listen()
        RayLauncher(Resources())
        assert ray.open


def test_a_cluster_with_gpus_asks_how_many_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = play(monkeypatch, FakeRay({"CPU": 4.0, "GPU": 2.0}))
    with pytest.raises(ValueError, match=r"got no `gpu`. Add `resources: \{gpu: 1\}`"):
        RayLauncher(Resources())
    assert not fake.open
    RayLauncher(Resources(gpu=0.5))
    assert fake.reserved["num_gpus"] == 0.5


def test_what_no_node_has_is_told(ray: FakeRay, capsys: pytest.CaptureFixture[str]) -> None:
    RayLauncher(Resources(cpu=4))
    assert capsys.readouterr().err == ""
    RayLauncher(Resources(cpu=5, gpu=1.0))
    assert "No node of the Ray cluster has 5 CPU, 1 GPU now" in capsys.readouterr().err


# What is handed to Ray.


def test_ray_reserves_the_resources_and_moves_runs_of_lost_nodes_only(
    ray: FakeRay, tmp_path: Path
) -> None:
    launcher = RayLauncher(Resources(cpu=3))
    assert ray.reserved["num_cpus"] == 3
    assert ray.reserved["max_retries"] > 0
    assert ray.reserved["retry_exceptions"] is False
    assert launcher.has_room(10**6)
    launcher.start(make_job(tmp_path).folder)
    assert ray.tasks[0]["variables"]["OMP_NUM_THREADS"] == "3"
    assert ray.tasks[0]["variables"]["CUDA_VISIBLE_DEVICES"] == ""
    assert str(Path(os.__file__).parent) not in ray.tasks[0]["paths"]


def test_a_connection_that_was_there_before_is_kept(ray: FakeRay) -> None:
    ray.open = True
    RayLauncher(Resources()).close()
    assert ray.open
    ray.open = False
    RayLauncher(Resources()).close()
    assert not ray.open


# Where a run is.


def test_a_run_is_queued_until_a_node_begins_it(ray: FakeRay, tmp_path: Path) -> None:
    job = started(tmp_path)
    assert job.state is State.QUEUED
    assert job.elapsed is None
    ray.begin(0, "node1")
    job.poll(75)
    assert job.state is State.RUNNING


def test_a_run_is_queued_again_when_its_node_has_died(ray: FakeRay, tmp_path: Path) -> None:
    job = started(tmp_path)
    ray.begin(0, "node1")
    job.poll(75)
    ray.lose("node1")
    job.poll(75)
    assert job.state is State.QUEUED
    ray.begin(0, "node0")
    job.poll(75)
    assert job.state is State.RUNNING


def test_the_note_of_an_earlier_time_tells_nothing(ray: FakeRay, tmp_path: Path) -> None:
    folder = make_job(tmp_path).folder
    launcher = RayLauncher(Resources())
    launcher.start(folder)
    ray.begin(0, "node0")
    assert not launcher.start(folder).begun


def test_a_submitted_run_is_not_submitted_again(ray: FakeRay, tmp_path: Path) -> None:
    job = started(tmp_path)
    with job.folder._lock:  # the lock that its process holds
        job.look()
    assert job.state is State.QUEUED


def test_it_waits_for_a_result_that_a_slow_file_system_shows_late(
    ray: FakeRay, tmp_path: Path
) -> None:
    job = started(tmp_path)
    ray.ended[0] = 0
    assert not job.poll(75)
    job.folder.result = {"metrics": {}}
    assert job.poll(75)
    assert job.state is State.DONE


def test_a_result_that_never_comes_is_a_folder_that_is_not_shared(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers_ray, "_LATE", 0.0)
    job = started(tmp_path)
    ray.ended[0] = 0
    assert job.poll(75)
    assert job.state is State.FAILED
    assert "must lie in a file system that all nodes share" in str(job.error)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (RayTaskError(FileNotFoundError("Node 'n' does not see '/x'.")), "does not see '/x'"),
        (RayError("The node died.\nIts id was 7."), "Ray gave it up: The node died."),
        (TaskCancelledError(), "was cancelled in Ray"),
    ],
)
def test_what_ray_says_is_the_error_of_the_run(
    ray: FakeRay, tmp_path: Path, ended: Exception, said: str
) -> None:
    job = started(tmp_path)
    ray.ended[0] = ended
    assert job.poll(75)
    assert job.state is State.FAILED
    assert said in str(job.error)


def test_another_process_at_the_run_is_no_failure(ray: FakeRay, tmp_path: Path) -> None:
    job = started(tmp_path)
    ray.ended[0] = 75  # the training of a lost node still has the lock
    assert job.poll(75)
    assert job.state is State.QUEUED
    assert job.process is None


class Interrupting(Display):
    def show(self, jobs: Any) -> None:
        if any(job.process for job in jobs):
            raise KeyboardInterrupt


def test_all_are_cancelled_before_one_is_waited_for(ray: FakeRay, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, name) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        work_off(jobs, RayLauncher(Resources()), Interrupting())
    assert ray.cancelled[:3] == [2, 1, 0]
    assert {job.state for job in jobs} == {State.QUEUED}
    assert all(job.process is None for job in jobs)


# On the node.


@pytest.fixture
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node0")
    fake = SimpleNamespace(get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", fake)


def train(folder: Path, code: str, directory: Path | None = None) -> int:
    return on_node.train(
        folder=str(folder),
        arguments=["-c", code],
        directory=str(directory or folder),
        paths=["/somewhere"],
        variables={"OMP_NUM_THREADS": "3"},
        submission="mine",
    )


def test_a_node_trains_where_the_comparison_was_started(on_a_node: None, tmp_path: Path) -> None:
    folder, directory = make_job(tmp_path).folder, tmp_path / "here"
    directory.mkdir()
    code = (
        "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], "
        "os.getppid() == int(os.environ['FLATMTL_PARENT']), '/somewhere' in sys.path); sys.exit(3)"
    )
    assert train(folder.path, code, directory) == 3
    assert folder.log.read_text() == f"{directory} 3 True True\n"
    note = json.loads((folder.path / on_node.NOTE).read_text())
    assert (note["submission"], note["node"]) == ("mine", "node0")


def test_a_second_try_keeps_what_the_first_has_printed(on_a_node: None, tmp_path: Path) -> None:
    folder = make_job(tmp_path).folder
    for word in "first", "second":
        assert train(folder.path, f"print('{word}')") == 0
    assert folder.log.read_text() == "second\n"
    assert folder.log.with_name("log.before.txt").read_text() == "first\n"


@pytest.mark.parametrize("missing", ["folder", "directory"])
def test_a_node_that_does_not_see_the_folders_says_so(
    on_a_node: None, tmp_path: Path, missing: str
) -> None:
    seen, unseen = make_job(tmp_path).folder.path, tmp_path / "unseen"
    folder, directory = (unseen, seen) if missing == "folder" else (seen, unseen)
    with pytest.raises(FileNotFoundError, match=f"does not see '{unseen}.*nodes share"):
        train(folder, "", directory)


def test_a_cancelled_task_ends_its_process(
    on_a_node: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_job(tmp_path).folder
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"

    def cancelled(seconds: float) -> None:
        time.sleep(0.01)
        if folder.log.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(on_node, "time", SimpleNamespace(sleep=cancelled))
    with pytest.raises(KeyboardInterrupt):
        train(folder.path, code)
    with pytest.raises(ProcessLookupError):
        os.kill(int(folder.log.read_text()), 0)
