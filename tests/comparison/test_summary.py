"""The numbers of the table, against numpy."""

import json
import math
from typing import Any

import numpy as np
import pytest

from lightning_flatmtl.comparison.metric_names import named, task_of, without_task
from lightning_flatmtl.comparison.summary import COST, DELTA_M, PARAMETERS, Summary, summarize
from lightning_flatmtl.comparison.table import latex, markdown, shown_columns

TASKS = ["left", "right"]
METHODS = ["LS", "F-LS", "MGDA"]


def row(method: str, seed: int, task: str = "", **more: Any) -> dict[str, Any]:
    """A run with made-up figures that differ in every entry."""
    rng = np.random.default_rng([seed, len(method), len(task), ord(method[0])])
    found = {"method": method, "task": task, "seed": seed, "status": "done", "error": ""}
    found |= {"seconds_per_step": float(rng.uniform(1, 2)), "peak_memory_mib": 1.0, "hash": "x"}
    for name in ("left/accuracy", "right/accuracy", "left/loss", "right/loss"):
        if not task or name.startswith(task):
            found[f"test/{name}"] = float(rng.uniform(0.5, 0.9))
    return {**found, **more}


def rows() -> list[dict[str, Any]]:
    singles = [row("single-task", seed, task) for seed in range(3) for task in TASKS]
    return singles + [row(method, seed) for method in METHODS for seed in range(3)]


def summed(given: list[dict[str, Any]], **more: Any) -> Summary:
    return summarize(given, METHODS, TASKS, **{"reference": "LS", **more})


def test_delta_m_of_the_metrics_that_are_named() -> None:
    given = rows()
    names = ["left/accuracy", "right/accuracy", "left/loss"]
    everything = summed(given, wanted=names)
    chosen = summed(given, wanted=names, improving=["right/accuracy"])
    by = {(r["method"], r["task"], r["seed"]): r for r in given}
    for method in METHODS:
        gains = [
            100 * by[method, "", s]["test/right/accuracy"]
            / by["single-task", "right", s]["test/right/accuracy"] - 100
            for s in range(3)
        ]  # fmt: skip
        assert chosen.figures[method][DELTA_M].mean == pytest.approx(np.mean(gains), rel=1e-9)
        assert everything.figures[method][DELTA_M].mean != pytest.approx(np.mean(gains), rel=1e-3)
    assert [c.name for c in chosen.columns] == [c.name for c in everything.columns]
    with pytest.raises(
        ValueError, match=r"`delta_m` must be what the runs log, got 'right/acuracy'"
    ):
        summed(given, improving=["right/acuracy"])


def test_means_deviations_delta_m_and_cost() -> None:
    given = rows()
    found = summed(given)
    by = {(r["method"], r["task"], r["seed"]): r for r in given}
    for method in METHODS:
        of = [by[method, "", seed] for seed in range(3)]
        figures = found.figures[method]
        left = np.array([r["test/left/accuracy"] for r in of])
        assert figures["test/left/accuracy"].mean == pytest.approx(left.mean(), rel=1e-12)
        assert figures["test/left/accuracy"].std == pytest.approx(left.std(ddof=1), rel=1e-12)
        assert figures["test/left/accuracy"].error == pytest.approx(
            left.std(ddof=1) / math.sqrt(3), rel=1e-12
        )
        both = (left + np.array([r["test/right/accuracy"] for r in of])) / 2
        assert figures["average/accuracy"].mean == pytest.approx(both.mean(), rel=1e-12)
        gains = [
            50 * sum(
                (r[f"test/{t}/accuracy"] / by["single-task", t, r["seed"]][f"test/{t}/accuracy"])
                - 1
                for t in TASKS
            )
            for r in of
        ]  # fmt: skip
        assert figures[DELTA_M].mean == pytest.approx(np.mean(gains), rel=1e-9)
        assert [r[DELTA_M] for r in of] == pytest.approx(gains, rel=1e-9)
        cost = np.mean([r["seconds_per_step"] for r in of])
        reference = np.median([by["LS", "", seed]["seconds_per_step"] for seed in range(3)])
        assert figures[COST].mean == pytest.approx(cost / reference, rel=1e-12)
    difference = [
        by["F-LS", "", s]["test/left/accuracy"] - by["LS", "", s]["test/left/accuracy"]
        for s in range(3)
    ]
    gain = found.gains["F-LS over LS"]["test/left/accuracy"]
    assert gain.mean == pytest.approx(np.mean(difference), rel=1e-12)
    assert gain.error == pytest.approx(np.std(difference, ddof=1) / math.sqrt(3), rel=1e-12)
    assert found.figures["single-task"][DELTA_M].mean == 0
    json.dumps(found.as_json())


def test_parameters_are_shown_where_they_differ() -> None:
    sizes = {"LS": 1234567, "F-LS": 1234567, "MGDA": 7, "single-task": 50}
    given = [{**r, "parameters": sizes[r["method"]]} for r in rows()]
    found = summed(given)
    assert found.columns[-1].name == PARAMETERS
    assert found.figures["single-task"][PARAMETERS].mean == 100  # both networks
    assert PARAMETERS not in found.gains["F-LS over LS"]
    lines = markdown(found).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1] for line in lines[2:6]}
    assert cells == {
        "single-task": "100 |",
        "LS": "1,234,567 |",
        "F-LS": "1,234,567 |",
        "MGDA": "7 |",
    }
    assert "1,234,567" in latex(found)


def test_parameters_are_left_out_where_they_are_the_same_or_unknown() -> None:
    same = [{**r, "parameters": 7} for r in rows()]
    before = [{**r, "parameters": None} for r in rows()]  # results of earlier versions
    for given in (same, before, rows()):
        assert PARAMETERS not in {column.name for column in summed(given).columns}


def test_best_and_close() -> None:
    given = [
        {**row(method, seed), "test/left/accuracy": value, "test/left/loss": 1 - value}
        for method, values in {
            "LS": (0.80, 0.82),
            "F-LS": (0.88, 0.92),  # standard error 0.02
            "MGDA": (0.88, 0.885),
        }.items()
        for seed, value in enumerate(values)
    ]
    found = summed(given)
    columns = {column.name: column for column in found.columns}
    accuracy, loss = columns["test/left/accuracy"], columns["test/left/loss"]
    assert found.best(accuracy) == found.best(loss) == {"F-LS"}
    assert found.close(accuracy) == found.close(loss) == {"MGDA"}
    table = markdown(found)
    (flat,) = (line for line in table.splitlines() if line.startswith("| F-LS"))
    (near,) = (line for line in table.splitlines() if line.startswith("| MGDA"))
    assert "**90.00 ± 2.83**" in flat
    assert "<u>88.25 ± 0.35</u>" in near
    assert r"\textbf{90.00 $\pm$ 2.83}" in latex(found)
    assert r"\underline{88.25 $\pm$ 0.35}" in latex(found)
    assert "single-task" not in table
    assert DELTA_M not in columns


def test_a_single_seed_has_no_deviation() -> None:
    table = markdown(summed([row(method, 0) for method in METHODS]))
    assert "±" not in table
    assert "One seed (0). Best in bold." in table


def test_only_complete_seeds_are_compared() -> None:
    given = [r for r in rows() if not (r["task"] == "right" and r["seed"] == 1)]
    found = summed(given)
    assert set(found.figures["LS"][DELTA_M].by_seed) == {0, 2}
    assert set(found.figures["LS"]["test/left/accuracy"].by_seed) == {0, 1, 2}


def test_what_has_failed_or_is_missing_is_said() -> None:
    given = rows()
    given[-1] = {**row("MGDA", 2), "status": "failed", "error": "ValueError: a fault"}
    given[-2] = {**row("MGDA", 1), "status": "queued"}
    table = markdown(summed(given))
    assert "- MGDA, seed 2: ValueError: a fault" in table
    assert "Not done yet: MGDA (1)." in table


def test_nothing_is_done() -> None:
    found = summed([{**row("LS", 0), "status": "failed", "error": "x"}], wanted=["left/accuracy"])
    assert found.figures == {}
    assert "No run is done." in markdown(found)
    assert latex(found).count(r"\\") == 1


def test_directions_that_nobody_says() -> None:
    given = [
        {**row(m, s, t), f"test/{t or 'left'}/score": 0.5}
        for m, t in [("single-task", "left"), ("single-task", "right"), ("LS", "")]
        for s in range(2)
    ]
    found = summed(given)
    assert "whether higher is better for test/left/score" in found.notes[0]
    said = summed(given, directions={"score": True})
    assert said.notes == ()


def test_a_wide_table_shows_averages() -> None:
    tasks = [f"t{index}" for index in range(40)]
    given = [
        {
            **{k: v for k, v in row("LS", seed).items() if not k.startswith("test/")},
            **{f"test/{task}/accuracy": 0.5 for task in tasks},
        }
        for seed in range(2)
    ]
    found = summarize(given, ["LS"], tasks)
    assert [column.name for column in shown_columns(found)] == ["average/accuracy", COST]


def test_the_averages_of_forty_tasks_are_read_at_a_glance() -> None:
    """CelebA: an error and a loss of forty tasks and their single-task networks."""
    tasks = [f"t{index}" for index in range(40)]
    common = {k: v for k, v in row("LS", 0).items() if not k.startswith("test/")}

    def of(tasks: list[str], error: float) -> dict[str, float]:
        errors = {f"test/{task}/error_rate": error for task in tasks}
        return errors | {f"test/{task}/loss": 2 * error for task in tasks}

    given = [
        *({**common, "method": "single-task", "task": t, **of([t], 0.08)} for t in tasks),
        {**common, **of(tasks, 0.1)},
        {**common, "method": "F-LS", **of(tasks, 0.09)},
    ]
    found = summarize(given, ["LS", "F-LS"], tasks)
    names = [column.name for column in shown_columns(found)]
    assert names == ["average/error_rate", "average/loss", DELTA_M, COST]
    head, _, *rows = markdown(found).splitlines()[:5]
    assert head.startswith("| method | average error rate [%] ↓ | average loss ↓ | Delta_m [%] ↑ |")
    assert rows[0].startswith("| single-task | 8.00 | 0.1600 | 0 |")
    assert rows[2].startswith("| F-LS | **9.00** | **0.1800** | **-12.50** |")


@pytest.mark.parametrize(
    ("name", "task", "rest"),
    [
        ("test/left/accuracy", "left", "accuracy"),
        ("test_left_acc", "left", "test__acc"),
        ("left.f1", "left", "f1"),
        ("test/lefty/accuracy", None, None),
        ("test/left_right/accuracy", "right", None),
    ],
)
def test_the_task_of_a_name(name: str, task: str | None, rest: str | None) -> None:
    assert task_of(name, TASKS) == task
    if task is not None and rest is not None:
        assert without_task(name, task).strip("_") == rest


def test_names_with_and_without_their_stage() -> None:
    logged = ["test/left/accuracy", "test_acc"]
    assert named(["left/accuracy", "test_acc"], logged) == logged
    with pytest.raises(ValueError, match="got 'left/acuracy'. Did you mean 'left/accuracy'"):
        named(["left/acuracy"], logged)
