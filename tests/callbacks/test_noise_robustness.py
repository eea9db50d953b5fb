"""NoiseRobustness: its figures against a brute force, and what it writes and refuses."""

import csv
import math
import pickle
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import NoiseRobustness
from tests.callbacks.surroundings import MEASURED, Ordinary, at, by_filter, gaussian, ordinary
from tests.helpers import data, fit, module, trainer
from tests.hosts import foreign, smooth_trunk

RADII = (0.5, 2.0)


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path, run: str = "fit") -> dict[tuple[str, float], tuple[float, float]]:
    return {
        (f"{r['task']}/{r['metric']}".strip("/"), float(r["radius"])): (
            float(r["mean"]),
            float(r["std"]),
        )
        for r in rows(path)
        if r["run"] == run
    }


def brute_force(net: Any, loader: Any, relative: bool, directions: int, seed: int) -> Any:
    """Mean and standard deviation by name and radius."""
    found: dict[tuple[str, float], list[float]] = {}
    for drawn in gaussian(net, seed, directions):
        norm = math.sqrt(sum(float(z.square().sum()) for z in drawn))
        unit = by_filter(net, drawn, vectors=True) if relative else [z / norm for z in drawn]
        for r in (0.0, *RADII):
            for name, value in at(net, loader.dataset, [r * u for u in unit]).items():
                found.setdefault((name, r), []).append(value)
    return {key: (statistics.fmean(v), statistics.stdev(v)) for key, v in found.items()}


def tolerance(key: tuple[str, float]) -> float:
    """Torchmetrics adds up in single precision."""
    return 1e-9 if key[0].endswith("/loss") else 1e-6


METHODS = {"none": list, "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.1)]}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", MEASURED)
def test_the_figures_are_those_of_a_brute_force(host, method, relative, tmp_path) -> None:
    file, val = tmp_path / "new" / "noise.csv", data(n=20, seed=1)  # 8, 8 and 4 samples
    noise = NoiseRobustness(RADII, 3, relative=relative, seed=5, csv=file)
    net = MEASURED[host]()
    made = fit(net, [*METHODS[method](), noise], val=val, max_epochs=2)
    expected, found = brute_force(net, val, relative, 3, 5), table(file)
    word = "relative" if relative else "radius"
    for key, (mean, std) in expected.items():
        assert found[key][0] == pytest.approx(mean, abs=tolerance(key)), key
        assert found[key][1] == pytest.approx(std if key[1] else 0.0, abs=tolerance(key)), key
        name, radius = key
        logged = made.callback_metrics[f"noise/{name}/{word}_{radius:g}"].item()
        assert logged == pytest.approx(mean, abs=1e-5)
        if radius:
            logged = made.callback_metrics[f"noise/{name}/{word}_{radius:g}_std"].item()
            assert logged == pytest.approx(std, abs=1e-5)
    spreads = [std for (_, radius), (_, std) in expected.items() if radius]
    assert max(spreads) > 0.01  # the directions do differ
    extra = {name for name, _ in found} - {name for name, _ in expected}
    assert extra == ({"loss", "a/f1"} if host == "module" else {"odd"})


def test_radius_zero_is_what_validation_logs(tmp_path) -> None:
    net, val = MEASURED["module"](), data(n=20, seed=1)
    made = fit(net, [NoiseRobustness(RADII, 1)], val=val)
    logged = made.callback_metrics
    for name in ("a/loss", "a/accuracy", "a/f1", "b/mse", "loss"):
        assert logged[f"noise/{name}/radius_0"].item() == pytest.approx(
            logged[f"val/{name}"].item(), rel=1e-6
        )


@pytest.mark.parametrize("run", ["validate", "test"])
@pytest.mark.parametrize("host", MEASURED)
def test_it_looks_in_an_evaluation(host, run, tmp_path) -> None:
    file, loader = tmp_path / "noise.csv", data(n=20, seed=1)
    net = MEASURED[host]()
    made = trainer([NoiseRobustness(RADII, 2, csv=file)], logger=CSVLogger(tmp_path))
    (returned,) = getattr(made, run)(net, loader, verbose=False)
    expected = brute_force(net, loader, False, 2, 0)
    for (name, radius), (mean, _) in expected.items():
        assert table(file, run)[name, radius][0] == pytest.approx(mean, abs=1e-6)
        assert returned[f"noise/{name}/radius_{radius:g}"] == pytest.approx(mean, abs=1e-5)
    written = rows(Path(made.logger.log_dir) / "metrics.csv")
    assert [r["noise/a/loss/radius_2"] for r in written if r["noise/a/loss/radius_2"]]
    assert len(table(file, run)) == len(rows(file))


def test_it_logs_to_every_logger_after_epochs_and_at_the_end(tmp_path) -> None:
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    noise = NoiseRobustness(RADII, 2, every_n_epochs=2, csv=tmp_path / "noise.csv")
    net = MEASURED["module"]()
    fit(net, [noise], val=data(n=8), logger=loggers, max_epochs=5)
    for logger in loggers:
        written = rows(Path(logger.log_dir) / "metrics.csv")
        looked = [r for r in written if r["noise/b/mse/radius_0.5"]]
        assert [(int(r["epoch"]), int(r["step"])) for r in looked] == [(1, 5), (3, 11), (4, 14)]
    of_radius = [r for r in rows(tmp_path / "noise.csv") if r["radius"] == "2.0"]
    steps = [(r["epoch"], r["step"]) for r in of_radius if r["metric"] == "mse"]
    assert steps == [("1", "6"), ("3", "12"), ("4", "15")]


def test_what_was_just_looked_at_is_not_looked_at_again(tmp_path) -> None:
    file = tmp_path / "noise.csv"
    noise = NoiseRobustness(RADII, 2, every_n_epochs=2, csv=file)
    fit(MEASURED["module"](), [noise], val=data(n=8), max_epochs=4)
    steps = {row["step"] for row in rows(file)}
    assert steps == {"6", "12"}
    assert len(rows(file)) == 2 * len(table(file))


def test_batches_may_be_limited(tmp_path) -> None:
    net, val = MEASURED["taken over"](), data(n=20, seed=1)
    file = tmp_path / "noise.csv"
    fit(net, [NoiseRobustness(RADII, 2, batches=1, csv=file)], val=val)
    val.dataset.inputs = val.dataset.inputs[:8]
    val.dataset.targets = {t: y[:8] for t, y in val.dataset.targets.items()}
    for key, (mean, _) in brute_force(net, val, False, 2, 0).items():
        assert table(file)[key][0] == pytest.approx(mean, abs=1e-6)


def test_of_several_loaders_the_first_is_looked_at(tmp_path) -> None:
    class Several(Ordinary):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            super().validation_step(batch, batch_idx)

        test_step = validation_step

    net, vals = ordinary(kind=Several), [data(n=20, seed=1), data(n=20, seed=2)]
    file = tmp_path / "noise.csv"
    fit(net, [NoiseRobustness(RADII, 2, csv=file)], val=vals)
    for key, (mean, _) in brute_force(net, vals[0], False, 2, 0).items():
        assert table(file)[key][0] == pytest.approx(mean, abs=1e-6)


def test_an_existing_module_counts_labels_as_it_says(tmp_path) -> None:
    class Counts(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "counts": {"a": 1 + 2 * batch_idx, "b": 3}}

    net, val, file = ordinary(kind=Counts), data(n=16, seed=1), tmp_path / "noise.csv"
    fit(net, [NoiseRobustness(RADII, 1, csv=file)], val=val)
    halves = []
    for batch in val:
        one = data(n=16, seed=1)
        one.dataset.inputs, one.dataset.targets = batch
        halves.append(brute_force(net, one, False, 2, 0)["a/loss", 0.0][0])
    expected = (halves[0] + 3 * halves[1]) / 4
    assert table(file)["a/loss", 0.0][0] == pytest.approx(expected, abs=1e-6)


def test_the_files_of_later_runs(tmp_path) -> None:
    file, net = tmp_path / "noise.csv", MEASURED["module"]()
    noise = NoiseRobustness(RADII, 1, csv=file)
    made = fit(net, [noise], val=data(n=8))
    made.test(net, data(n=8, seed=2), verbose=False)
    made.test(net, data(n=16, seed=2), verbose=False)
    runs = [row["run"] for row in rows(file)]
    assert runs.count("fit") == runs.count("test") == len(runs) / 2
    fit(net, [noise], val=data(n=8))
    assert {row["run"] for row in rows(file)} == {"fit"}


def test_a_resumed_fit_goes_on_where_it_was(tmp_path) -> None:
    def looks(file: str) -> NoiseRobustness:
        return NoiseRobustness(RADII, 2, every_n_epochs=1, csv=tmp_path / file)

    val = data(n=8, seed=1)
    fit(MEASURED["module"](), [looks("whole.csv")], val=val, max_epochs=4)
    first = fit(MEASURED["module"](), [looks("parts.csv")], val=val, max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    for epochs in (3, 4):
        net, noise = MEASURED["module"](), looks("parts.csv")
        fit(net, [noise], val=val, max_epochs=epochs, ckpt_path=tmp_path / "half.ckpt")
    whole, parts = (tmp_path / name for name in ("whole.csv", "parts.csv"))
    assert whole.read_text("utf-8") == parts.read_text("utf-8")


@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_it_draws_a_picture(tasks, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from lightning_flatmtl.callbacks._noise_picture import draw_noise

    curve = [(0.0, 1.0, 0.0), (1.0, 2.0, 0.5), (2.0, math.inf, math.nan)]
    metrics = {m: {f"t{i}": curve for i in range(tasks)} for m in ("loss", "accuracy", "f1", "mse")}
    metrics["loss"][""] = curve
    draw_noise(metrics, "test data", 3, False, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_a_fit(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "noise.png"
    fit(MEASURED["module"](), [NoiseRobustness(RADII, 2, png=str(file))], val=data(n=8))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_fit_without_validation_data_is_refused_before_the_first_batch() -> None:
    message = r"NoiseRobustness looks at validation data, got a fit without any"
    for net in (module(), foreign()):
        with pytest.raises(MisconfigurationException, match=message):
            fit(net, [NoiseRobustness()])
        fit(net, [NoiseRobustness(runs=["test"])])


def test_a_module_that_returns_no_losses_is_told_at_the_first_batch() -> None:
    class Silent(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch_idx == 0
            return super().training_step(batch, batch_idx)["loss"]

    message = "For NoiseRobustness `training_step` must return"
    with pytest.raises(MisconfigurationException, match=message):
        fit(ordinary(kind=Silent), [NoiseRobustness()], val=data(n=8))


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_a_module_with_manual_optimization_is_refused_before_the_first_batch(run) -> None:
    net = ordinary()
    net.automatic_optimization = False
    made = trainer([NoiseRobustness()])
    data_of_run = (data(), data(n=8)) if run == "fit" else (data(n=8),)
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        getattr(made, run)(net, *data_of_run)
    assert made.global_step == 0


def test_a_module_without_trainable_parameters_is_refused() -> None:
    net = ordinary().requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="moves the trainable parameters, got Ord"):
        trainer([NoiseRobustness()]).validate(net, data(n=8), verbose=False)


def test_frozen_parameters_do_not_move(tmp_path) -> None:
    net, val = MEASURED["module"](trunk=smooth_trunk()), data(n=8, seed=1)
    net.encoder.requires_grad_(False)
    seen: list[torch.Tensor] = []
    net.encoder.register_forward_hook(lambda layer, *_: seen.append(layer[1].weight.clone()))
    file = tmp_path / "noise.csv"
    trainer([NoiseRobustness(RADII, 2, csv=file)]).validate(net, val, verbose=False)
    assert len(seen) == 6
    assert all(torch.equal(weight, net.encoder[1].weight) for weight in seen)
    heads = nn.Module()
    heads.heads = net.heads
    drawn = gaussian(heads, 0, 2)[0]
    norm = math.sqrt(sum(float(z.square().sum()) for z in drawn))
    still = [torch.zeros_like(p) for p in net.encoder.parameters()]
    expected = at(net, val.dataset, [*still, *(2 * z / norm for z in drawn)])
    second = gaussian(heads, 0, 2)[1]
    norm = math.sqrt(sum(float(z.square().sum()) for z in second))
    other = at(net, val.dataset, [*still, *(2 * z / norm for z in second)])
    mean = (expected["a/loss"] + other["a/loss"]) / 2
    assert table(file, "validate")["a/loss", 2.0][0] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": ()}, r"`radii` must be one or more different numbers in \(0, inf\), got \(\)"),
        ({"radii": [1.0, 0.0]}, r"`radii` must be .*, got \[1.0, 0.0\]"),
        ({"radii": [math.nan]}, r"`radii` must be .*, got \[nan\]"),
        ({"radii": [math.inf]}, r"`radii` must be .*, got \[inf\]"),
        ({"radii": [1, 1.0]}, r"`radii` must be .*, got \[1, 1.0\]"),
        ({"radii": 3.0}, r"`radii` must be .*, got 3.0"),
        ({"radii": "123"}, r"`radii` must be .*, got '123'"),
        ({"radii": [True]}, r"`radii` must be .*, got \[True\]"),
        ({"directions": 0}, "`directions` must be an integer >= 1, got 0"),
        ({"directions": math.nan}, "`directions` must be an integer >= 1, got nan"),
        ({"relative": 1}, "`relative` must be True or False, got 1"),
        ({"batches": 0}, "`batches` must be an integer >= 1 or None, got 0"),
        ({"every_n_epochs": True}, "`every_n_epochs` must be an integer >= 1 or None, got True"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"runs": "fit"}, r"`runs` must be one or more of \['fit', 'validate', 'test'\], got 'fit"),
        ({"runs": ["train"]}, r"`runs` must be one or more of .*, got \['train'\]"),
        ({"runs": []}, r"`runs` must be one or more of .*, got \[\]"),
        ({"csv": "noise.txt"}, "`csv` must be the path of a .csv file, got 'noise.txt'"),
        ({"png": 3}, "`png` must be the path of a .png file, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseRobustness(**settings)


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch) -> None:
    monkeypatch.setattr("lightning_flatmtl.callbacks._pictures.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[plots\]"'):
        NoiseRobustness(png="noise.png")


def test_it_is_pickled_and_found_by_its_class_name() -> None:
    from jsonargparse import ArgumentParser

    import lightning_flatmtl.cli  # noqa: F401

    assert pickle.loads(pickle.dumps(NoiseRobustness([7]))).radii == (7.0,)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    given = {"class_path": "NoiseRobustness", "init_args": {"radii": [1, 2], "runs": ["test"]}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, NoiseRobustness)
    assert made.radii == (1.0, 2.0)
