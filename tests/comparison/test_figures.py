"""The figures of a comparison: which there are, what they show, and that none spoils a table."""

import json
import math
import struct
from pathlib import Path

import pytest

from lightning_flatmtl.comparison import figures as package
from lightning_flatmtl.comparison.command import compare_command
from lightning_flatmtl.comparison.comparison import Comparison
from lightning_flatmtl.comparison.curves import TRAIN_LOSS, Curves
from lightning_flatmtl.comparison.figures import styles_of, write_figures, writing
from lightning_flatmtl.comparison.jobs import State
from lightning_flatmtl.comparison.settings import SINGLE_TASK, Settings
from lightning_flatmtl.comparison.summary import Summary, summarize

BASE = Path(package.__file__).parents[3] / "examples" / "multidigits" / "base.yaml"
TASKS = ("left", "right")
ARMS = ("LS", "F-LS", "CAGrad", "F-CAGrad", "F-CAGrad (direct)", "F-CAGrad (each)")
INSTALL = 'pip install "lightning-flatmtl[plots]"'


def rows_of(methods, seeds, tasks=TASKS, single=True, value=lambda method, seed: 0.5):
    rows = []
    for seed in seeds:
        for task in tasks if single else ():
            row = {f"test/{task}/accuracy": 0.8 + 0.01 * seed}
            rows.append({"method": SINGLE_TASK, "task": task, **row})
        for i, method in enumerate(methods):
            row = {f"test/{task}/accuracy": value(method, seed) + 0.01 * i for task in tasks}
            rows.append({"method": method, "task": "", **row, "seconds_per_step": 0.1 + 0.01 * i})
        for row in rows:
            row.setdefault("seed", seed)
    return [{"status": "done", "error": "", "seconds_per_step": 0.1} | row for row in rows]


def curves_of(folder: Path, methods, seeds, loss=lambda method, seed, epoch: 1 / (1 + epoch)):
    found: dict[str, list[Path]] = {}
    for i, method in enumerate(methods):
        for seed in seeds:
            curves = Curves()
            for epoch in range(4):
                value = loss(method, seed, epoch)
                curves.add(epoch, epoch, {TRAIN_LOSS: value, "val/loss": value + 1})
            path = folder / f"{i}-{seed}.csv"
            curves.write(path)
            found.setdefault(method, []).append(path)
    return found


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG that is whole."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def written(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    for name in names:
        width, height = size(folder / name)
        assert 600 < width < 2500, name
        assert 250 < height < 6000, name
    return names


def summed(methods, seeds, **how) -> Summary:
    tasks = how.get("tasks", TASKS)
    return summarize(rows_of(methods, seeds, **how), list(methods), tasks)


# How methods look.


def test_a_flat_method_and_its_arms_have_the_colour_of_the_plain_one() -> None:
    styles = styles_of(["LS", "F-LS", "CAGrad", "F-CAGrad", "F-CAGrad (direct)", "CAGrad c=0.9"])
    assert styles["LS"].colour == styles["F-LS"].colour != styles["CAGrad"].colour
    family = ["CAGrad", "F-CAGrad", "F-CAGrad (direct)", "CAGrad c=0.9"]
    assert {styles[name].family for name in family} == {"CAGrad"}
    assert len({styles[name].colour for name in family}) == 1
    assert [styles[name].filled for name in family] == [False, True, True, False]
    assert len({(s.line, s.hatch, s.filled) for s in map(styles.get, family) if s}) == 4
    assert len({(s.marker, s.filled) for s in map(styles.get, family) if s}) == 4


@pytest.mark.parametrize("number", [1, 6, 15, 40])
def test_no_two_methods_look_the_same(number: int) -> None:
    methods = [f"{flat}X{i}" for i in range(number) for flat in ("", "F-")]
    styles = styles_of(methods)
    looks = {(s.colour, s.marker, s.filled) for s in styles.values()}
    assert len(looks) == 2 * number + 1
    assert len({styles[m].colour for m in methods}) == min(number, 7)


def test_the_single_task_runs_are_of_no_methods_colour() -> None:
    styles = styles_of(ARMS)
    assert styles[SINGLE_TASK].colour not in {styles[method].colour for method in ARMS}


@pytest.mark.parametrize(
    ("methods", "families"),
    [
        (["F-LS"], ["LS"]),
        (["Method A", "Method B"], ["Method A", "Method B"]),
        (["CAGrad", "CAGrad2"], ["CAGrad", "CAGrad2"]),
        (["F-CAGrad (direct)"], ["CAGrad"]),
        (["F-CAGrad [0.4]", "CAGrad rho=1"], ["CAGrad", "CAGrad rho=1"]),
        (["(odd)", "F-", ""], ["(odd)", "", ""]),
    ],
)
def test_families_are_told_from_names(methods, families) -> None:
    styles = styles_of(methods)
    assert [styles[method].family for method in methods] == families


# Which figures there are.


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("methods", "seeds"),
    [(("LS",), (0,)), (("LS", "F-LS"), (0,)), (ARMS, (0, 1, 2)), (tuple("ABCDEFGHIJ"), (0, 1))],
)
def test_every_metric_has_a_figure(matplotlib, tmp_path, methods, seeds) -> None:
    curves = curves_of(tmp_path / "runs", methods, seeds)
    remarks = write_figures(tmp_path / "new", summed(methods, seeds), methods, curves)
    assert remarks == ()
    assert written(tmp_path / "new") == {
        "left_accuracy.png",
        "right_accuracy.png",
        "average_accuracy.png",
        "delta_m.png",
        "delta_m_over_cost.png",
        "curves.png",
    }


def test_without_single_tasks_the_average_is_drawn_over_cost(matplotlib, tmp_path) -> None:
    write_figures(tmp_path / "new", summed(ARMS, (0,), single=False), ARMS, {})
    assert written(tmp_path / "new") == {
        "left_accuracy.png",
        "right_accuracy.png",
        "average_accuracy.png",
        "average_accuracy_over_cost.png",
    }


def test_many_tasks_have_a_figure_each(matplotlib, tmp_path) -> None:
    tasks = tuple(f"attribute_{i}" for i in range(5))
    write_figures(tmp_path / "new", summed(ARMS[:2], (0, 1), tasks=tasks), ARMS, {})
    assert len(written(tmp_path / "new")) == 5 + 3


def test_names_that_differ_have_files_that_differ(matplotlib, tmp_path) -> None:
    names = ("test/a/b c", "test/a/b_c", "test/A/B_C", "test/curves", "test/../x", "test/é")
    row = {"method": "LS", "task": "", "seed": 0, "status": "done", "error": ""}
    rows = [row | dict.fromkeys(names, 0.5)]
    write_figures(tmp_path / "new", summarize(rows, ["LS"], []), ["LS"], {})
    assert written(tmp_path / "new") == {
        "a_b_c.png", "a_b_c_2.png", "A_B_C_3.png", "curves_2.png", "x.png", "é.png",
    }  # fmt: skip


# What they show.


def test_a_method_has_one_colour_in_all_figures(matplotlib, tmp_path) -> None:
    from matplotlib.colors import to_hex

    from lightning_flatmtl.comparison.figures import bars, curves, trade_off

    seeds = (0, 1)
    summary, styles = summed(ARMS, seeds), styles_of(ARMS)
    column = next(c for c in summary.columns if c.name == "test/left/accuracy")
    (axes,) = bars.draw_bars(summary, column, styles).axes
    # Outlines are drawn last of a bar, so that the colour of hatches may be another.
    outlines = {p.get_y(): to_hex(p.get_edgecolor()) for p in axes.patches if p.get_linewidth()}
    bar = dict(zip([SINGLE_TASK, *ARMS], (outlines[y] for y in sorted(outlines)), strict=True))
    legend = trade_off.draw_trade_off(summary, trade_off.gain_column(summary), styles).legends[0]
    looks = legend.legend_handles
    point = {
        text.get_text(): {to_hex(h.get_markerfacecolor()), to_hex(h.get_markeredgecolor())}
        for text, h in zip(legend.get_texts(), looks, strict=True)
    }
    runs = curves_of(tmp_path, ARMS, seeds)
    legend = curves.draw_curves(runs, styles).legends[0]
    line = {
        text.get_text(): to_hex(handle.get_color())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    for method in ARMS:
        colour = styles[method].colour.lower()
        assert bar[method] == colour
        assert point[method] == {colour, "#ffffff"}
        assert line[method] == colour
    assert bar[SINGLE_TASK] == styles[SINGLE_TASK].colour.lower()


def test_bars_end_at_the_means(matplotlib) -> None:
    from lightning_flatmtl.comparison.figures import bars

    values = {("LS", 0): 0.25, ("LS", 1): 0.75, ("F-LS", 0): 0.5, ("F-LS", 1): 0.7}
    summary = summed(("LS", "F-LS"), (0, 1), value=lambda m, s: values[m, s])
    column = next(c for c in summary.columns if c.name == "test/left/accuracy")
    (axes,) = bars.draw_bars(summary, column, styles_of(("LS", "F-LS"))).axes
    ends = sorted({patch.get_width() for patch in axes.patches})
    assert ends == pytest.approx([50.0, 61.0, 80.5])
    dots = sorted(x for each in axes.collections for x, _ in bars_dots(each))
    assert dots == pytest.approx([25.0, 51.0, 71.0, 75.0, 80.0, 81.0])
    assert "left accuracy [%] (higher is better)" in axes.get_xlabel()
    assert axes.get_xlim()[0] == 0


def bars_dots(collection):
    from matplotlib.collections import PathCollection

    return collection.get_offsets() if isinstance(collection, PathCollection) else []


def test_an_axis_that_does_not_begin_at_zero_says_so(matplotlib) -> None:
    from lightning_flatmtl.comparison.figures import bars

    summary = summed(ARMS, (0, 1), value=lambda m, s: 0.8 + 0.01 * s)
    column = next(c for c in summary.columns if c.name == "test/left/accuracy")
    (axes,) = bars.draw_bars(summary, column, styles_of(ARMS)).axes
    begin = axes.get_xlim()[0]
    assert begin > 0
    assert f"The axis begins at {begin:g}, not at 0." in axes.get_xlabel()
    low = min(value for f in summary.figures.values() for value in f[column.name].by_seed.values())
    assert begin < 100 * low


def test_delta_m_is_drawn_from_zero(matplotlib) -> None:
    from lightning_flatmtl.comparison.figures import bars

    summary = summed(ARMS, (0, 1))
    column = next(c for c in summary.columns if c.name == "test/delta_m")
    (axes,) = bars.draw_bars(summary, column, styles_of(ARMS)).axes
    low, high = axes.get_xlim()
    assert low < -20
    assert high >= 0
    assert SINGLE_TASK not in [text.get_text() for text in axes.get_yticklabels()]


def test_a_method_that_is_far_off_does_not_squeeze_the_others(matplotlib) -> None:
    from lightning_flatmtl.comparison.figures import trade_off

    summary = summed(ARMS, (0, 1), value=lambda m, s: 0.1 if m == "F-LS" else 0.7)
    column = trade_off.gain_column(summary)
    figure = trade_off.draw_trade_off(summary, column, styles_of(ARMS))
    mean = summary.figures["F-LS"][column.name].mean
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"F-LS: {mean:.1f}, off the axis" in texts
    assert figure.axes[0].get_ylim()[0] > mean


@pytest.mark.parametrize("value", [0.6, 5.0])
def test_a_method_that_is_near_or_better_is_drawn(matplotlib, value) -> None:
    from lightning_flatmtl.comparison.figures import trade_off

    summary = summed(ARMS, (0, 1), value=lambda m, s: value if m == "F-LS" else 0.7)
    figure = trade_off.draw_trade_off(summary, trade_off.gain_column(summary), styles_of(ARMS))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ARMS)


@pytest.mark.parametrize("methods", [ARMS[:2], tuple("ABCDEFGHIJ")])
def test_curves_are_means_over_the_seeds(matplotlib, tmp_path, methods) -> None:
    from lightning_flatmtl.comparison.figures.curves import draw_curves

    runs = curves_of(tmp_path, methods, (0, 2), loss=lambda m, s, e: s + 1 / (1 + e))
    axes = draw_curves(runs, styles_of(methods)).axes
    labels = [each.get_ylabel() for each in axes]
    assert "training loss" in labels
    assert "validation loss" in labels
    for name, add in (("training loss", 1), ("validation loss", 2)):
        each = axes[labels.index(name)]
        for line in each.get_lines():
            assert line.get_xdata().tolist() == [1, 2, 3, 4]
            assert line.get_ydata().tolist() == pytest.approx([add + 1 / (1 + e) for e in range(4)])


def test_a_seed_that_diverges_leaves_a_gap(matplotlib, tmp_path) -> None:
    from lightning_flatmtl.comparison.figures.curves import draw_curves

    def loss(method, seed, epoch):
        return math.inf if seed and epoch == 2 else 1.0

    runs = curves_of(tmp_path, ["LS"], (0, 1), loss=loss)
    (line,) = draw_curves(runs, styles_of(["LS"])).axes[0].get_lines()
    assert line.get_ydata().tolist() == pytest.approx([1, 1, math.nan, 1], nan_ok=True)


def test_an_epoch_is_drawn_where_all_seeds_have_it(matplotlib, tmp_path) -> None:
    from lightning_flatmtl.comparison.figures.curves import draw_curves

    runs = curves_of(tmp_path, ["LS"], (0, 1))
    lines = runs["LS"][1].read_text().splitlines()
    runs["LS"][1].write_text("\n".join(lines[:5]) + "\n")  # two epochs
    (line,) = draw_curves(runs, styles_of(["LS"])).axes[0].get_lines()
    assert line.get_xdata().tolist() == [1, 2]


def test_a_loss_that_falls_steeply_has_a_logarithmic_axis(matplotlib, tmp_path) -> None:
    from lightning_flatmtl.comparison.figures.curves import draw_curves

    runs = curves_of(tmp_path, ["LS"], (0,), loss=lambda m, s, e: 10.0 ** (3 - e))
    figure = draw_curves(runs, styles_of(["LS"]))
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]


# What is awkward.

NAN, INF = math.nan, math.inf
ODD = [(NAN, 0.5), (INF, -INF), (INF, 0.5), (0.0, 0.0), (-0.5, 0.5), (1e30, 0.5), (-1e30, -1e-30)]


@pytest.mark.parametrize(("first", "second"), ODD)
def test_odd_values_are_drawn_without_them(matplotlib, tmp_path, first, second) -> None:
    def value(method, seed):
        return [first, second, 0.5][seed] if method == "F-LS" else 0.5

    methods = ("LS", "F-LS")
    summary = summed(methods, (0, 1), value=value, tasks=("left",))
    curves = curves_of(tmp_path, methods, (0, 1), loss=lambda m, s, e: value(m, s))
    assert write_figures(tmp_path / "new", summary, methods, curves) == ()
    assert {"left_accuracy.png", "curves.png"} <= written(tmp_path / "new")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, -0.5, 1e30])
def test_one_value_for_all(matplotlib, tmp_path, value) -> None:
    summary = summed(("LS",), (0, 1), value=lambda m, s: value, tasks=("left",), single=False)
    assert write_figures(tmp_path / "new", summary, ("LS",), {}) == ()
    assert written(tmp_path / "new") == {"left_accuracy.png"}


def test_awkward_names(matplotlib, tmp_path) -> None:
    methods = ("_hidden", "$x$ {y}", r"F-$x$ {y}", "\\alpha & 5%", "x" * 200, "汉字")
    summary = summed(methods, (0, 1))
    curves = curves_of(tmp_path, methods, (0, 1))
    assert write_figures(tmp_path / "new", summary, methods, curves) == ()
    written(tmp_path / "new")


def test_a_method_that_failed_is_named(matplotlib) -> None:
    from lightning_flatmtl.comparison.figures import bars

    rows = rows_of(("LS",), (0,))
    rows.append({"method": "Bad", "task": "", "seed": 0, "status": "failed", "error": "no"})
    summary = summarize(rows, ["LS", "Bad"], TASKS)
    (axes,) = bars.draw_bars(summary, summary.columns[0], styles_of(("LS", "Bad"))).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [SINGLE_TASK, "LS", "Bad"]
    assert [text.get_text() for text in axes.texts][-1] == "failed"


def test_nothing_done_nothing_drawn(tmp_path) -> None:
    assert write_figures(tmp_path / "new", Summary((), {}), ["LS"], {}) == ()
    assert not (tmp_path / "new").exists()


def test_curves_that_are_not_there_or_broken(matplotlib, tmp_path) -> None:
    (tmp_path / "broken.csv").write_text("epoch,step,name,value\n0,0,train/loss/mean,what\n")
    summary = summed(("LS",), (0,))
    missing = {"LS": [tmp_path / "none.csv"]}
    assert write_figures(tmp_path / "new", summary, ["LS"], missing) == ()
    assert "curves.png" not in written(tmp_path / "new")
    broken = {"LS": [tmp_path / "broken.csv"]}
    (remark,) = write_figures(tmp_path / "new", summary, ["LS"], broken)
    assert remark.startswith("figures/curves.png is missing: ValueError: ")
    assert "delta_m.png" in written(tmp_path / "new")


def test_the_users_own_style_stays_and_is_not_used(matplotlib, tmp_path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black"}):
        assert write_figures(tmp_path / "new", summed(("LS",), (0,)), ["LS"], {}) == ()
        assert matplotlib.rcParams["axes.facecolor"] == "black"
        assert matplotlib.rcParams["text.usetex"]


# Beside the tables.


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    """Two methods with a run each that is done, without training."""
    content = {
        "config": str(BASE),
        "methods": {"LS": [], "CAGrad": ["CAGrad"]},
        "seeds": [0],
        "single_task": False,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(json.dumps(content), encoding="utf-8")

    def made() -> Comparison:
        return Comparison(Settings.load(tmp_path / "compare.yaml", []))

    first = made()
    first.prepare()
    for job in first.jobs:
        job.folder.result = {
            "metrics": {f"test/{task}/accuracy": 0.5 for task in TASKS},
            "seconds_per_step": 0.1,
        }
        (runs,) = curves_of(job.folder.path, [job.run.method], [job.run.seed]).values()
        runs[0].rename(job.folder.curves)
    done = made()
    assert [job.state for job in done.jobs] == [State.DONE] * 2
    return done


def test_a_comparison_writes_its_figures(matplotlib, comparison) -> None:
    results = comparison.write()
    assert results.remarks == ()
    assert written(comparison.output / "figures") == {
        "left_accuracy.png",
        "right_accuracy.png",
        "average_accuracy.png",
        "average_accuracy_over_cost.png",
        "curves.png",
    }


def test_a_figure_that_cannot_be_written_spoils_no_table(
    matplotlib, comparison, monkeypatch
) -> None:
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_whole", full)
    results = comparison.write()
    assert len(results.remarks) == 5
    assert "figures/curves.png is missing: OSError: [Errno 28] No space left" in results.remarks[1]
    for name in ("results.csv", "table.md", "table.tex", "summary.json"):
        assert (comparison.output / name).is_file()


def test_without_matplotlib_the_last_line_says_what_to_install(
    comparison, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    file = comparison.output.parent / "compare.yaml"
    assert compare_command(["--config", str(file)]) == 0
    assert INSTALL in capsys.readouterr().out.splitlines()[-1]
    assert (comparison.output / "table.md").is_file()
    assert not (comparison.output / "figures").exists()


def test_an_earlier_figure_is_replaced_as_a_whole(matplotlib, comparison) -> None:
    comparison.write()
    picture = comparison.output / "figures" / "curves.png"
    before = picture.read_bytes()
    picture.write_bytes(b"another")
    comparison.write()
    assert picture.read_bytes() == before
