"""The scripts of the examples run, and print what they promise."""

import logging
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = [
    "existing_project",
    "hf_lora_text",
    "joint_prediction",
    "one_task_at_a_time",
    "partial_labels",
    "task_attention",
    "transfer",
    "transformer_text",
    "two_datasets",
]

Run = Callable[..., str]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Run an example as ``python examples/name.py --fast ...`` does; returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--fast", *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    logger = logging.getLogger("lightning.pytorch")
    level, state = logger.level, torch.get_rng_state()
    yield run
    logger.setLevel(level)
    torch.set_rng_state(state)


def numbers(output: str, line: str) -> list[float]:
    """The numbers behind the name of a line; there is one such line, and they are finite."""
    (rest,) = re.findall(rf"^{re.escape(line)}(?=\s)(.*)$", output, re.MULTILINE)
    values = [
        float(word) for word in rest.split() if re.fullmatch(r"-?\d+(\.\d+)?|-?inf|nan", word)
    ]
    assert values, f"no number in {rest!r}"
    assert all(map(math.isfinite, values)), rest
    return values


def percent(*values: float) -> bool:
    return all(0 <= value <= 100 for value in values)


def test_every_script_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(TESTED)


@pytest.mark.parametrize("name", TESTED)
def test_the_docstring_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f"    python examples/{name}.py" in text.split('"""')[1]


def test_existing_project_with_and_without_the_callbacks(run: Run, tmp_path: Path) -> None:
    shown = {}
    for flag in ("--plain", "--seed=0"):
        output = run("existing_project", flag)
        shown[flag] = [number for task in ("digit", "turn") for number in numbers(output, task)]
        assert percent(*shown[flag])
        assert numbers(output, "optimizer steps:") == [32]  # 31 batches, two a step, two epochs
        (path,) = re.findall(r"^checkpoint: (.+)$", output, re.MULTILINE)
        checkpoint = torch.load(tmp_path / path, weights_only=True)
        assert any(name.startswith("encoder.") for name in checkpoint["state_dict"])
        taken_over = "lightning_flatmtl.partition" in checkpoint
        assert taken_over == (flag != "--plain")
        assert ("method: plain" in output) == (flag == "--plain")
        logs = (tmp_path / path).parents[1] / "metrics.csv"
        assert {"train/loss", "val/digit/accuracy", "lr-AdamW"} <= set(
            logs.read_text("utf-8").splitlines()[0].split(",")
        )
    assert shown["--plain"] != shown["--seed=0"]


def test_partial_labels(run: Run) -> None:
    output = run("partial_labels")
    assert numbers(output, "1000 training images") == [550, 550, 100]
    for batch in (1, 2, 3):
        digit, angle, both = numbers(output, f"a batch of 50  ({batch})")
        assert digit + angle - both == 50
    for line in (
        "one net, images with both labels",
        "a net for each task, all its labels",
        "one net, all labels",
    ):
        accuracy, error = numbers(output, line)
        assert percent(accuracy)
        assert 0 < error < 90


def test_task_attention(run: Run) -> None:
    output = run("task_attention", "--picture", "map.png")
    (accuracy,) = numbers(output, "test/digit/accuracy")
    assert 0 <= accuracy <= 1
    for task in ("digit", "even", "loop", "ink"):
        weights = numbers(output, task)
        assert len(weights) == 4
        assert sum(weights) == pytest.approx(1, abs=0.021)  # two digits each
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def test_two_datasets(run: Run) -> None:
    output = run("two_datasets")
    batches = {
        "the digits alone": (6, 0),
        "max_size_cycle": (6, 6),
        "max_size": (4, 6),
        "min_size": (6, 6),
    }
    for line, expected in batches.items():
        digit, odd, *accuracies = numbers(output, line)
        assert (digit, odd) == expected
        assert len(accuracies) == (1 if odd == 0 else 2)
        assert percent(*accuracies)
    assert "max_size_cycle" not in run("two_datasets", "--modes", "min_size")


def test_one_task_at_a_time(run: Run) -> None:
    output = run("one_task_at_a_time")
    for line in ("both in every batch", "one at a time"):
        values = numbers(output, line)
        assert len(values) == 4  # mean and deviation of two tasks
        assert percent(*values)


def test_transfer(run: Run) -> None:
    output = run("transfer")
    first, second, third = output.strip().split("\n\n")
    for method in ("plain sum", "TaskSAM"):
        for kind in ("from nothing", "encoder frozen", "encoder thawed"):
            values = numbers(first, f"{kind}, {method}")
            assert len(values) == 4  # mean and deviation of two tasks
            assert percent(*values)
    assert percent(*numbers(second, "encoder thawed, plain sum"))
    for pair in ("digit and turn", "digit and coin", "turn and coin"):
        one, _, other, _, mean, _ = numbers(third, pair)
        assert (one + other) / 2 == pytest.approx(mean, abs=0.011)


def test_joint_prediction(run: Run) -> None:
    output = run("joint_prediction")
    for part in output.strip().split("\n\n"):
        covered = []
        for threshold in ("0.0", "0.25"):
            values = [float(v) for v in re.findall(rf"^threshold {threshold} (.*)$", part, re.M)
                      [0].replace("±", "").split() if v != "nan"]  # fmt: skip
            assert percent(*values)
            covered.append(values[0])
        assert covered[0] == 100 >= covered[1]
        assert percent(*numbers(part, "area under the risk"))


def test_transformer_text(run: Run) -> None:
    output = run("transformer_text")
    assert "149 sentences for training, 50 for validation" in output
    for line, count in (("most frequent", 2), ("CAGrad + TaskSAM", 3), ("plain sum", 3)):
        values = numbers(output, line)
        assert len(values) == count
        assert percent(*values)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_hf_lora_text(run: Run) -> None:
    """Of the weights the adapters and the heads are trained, and nothing else."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    output = run("hf_lora_text")
    assert "149 sentences for training, 50 for validation" in output
    for line, count in (("most frequent", 2), ("CAGrad + TaskSAM", 3), ("plain sum", 3)):
        values = numbers(output, line)
        assert len(values) == count
        assert percent(*values)
    frozen, moved = numbers(output, "frozen")
    assert frozen > 50_000
    assert moved == 0
    for part in ("adapters", "heads"):
        weights, moved = numbers(output, part)
        assert 0.9 * weights < moved <= weights


def test_hf_lora_text_without_its_packages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="needs peft: pip install transformers peft"):
        run("hf_lora_text")


def test_the_sentences_are_as_their_header_says() -> None:
    text = (EXAMPLES / "text" / "sentences.tsv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines)) == 199
    for line in lines:
        kind, sentence = line.split("\t")
        assert kind in {"question", "statement", "request"}
        assert set(re.findall(r"/(\w+)", sentence)) <= {"PLACE", "TIME", "NUMBER", "PERSON"}
        assert re.fullmatch(r"[A-Za-z0-9]+(/[A-Z]+)?(,? [A-Za-z0-9]+(/[A-Z]+)?)*", sentence)
