import copy
import datetime
import math
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, SpearmanCorrCoef
from torchmetrics.wrappers import MultitaskWrapper, Running

import lightning_flatmtl.metrics
from lightning_flatmtl.functional.delta_m import delta_m
from lightning_flatmtl.metrics import DeltaM
from tests.functional import test_delta_m as published

BASELINES = {"digit/accuracy": 0.5, "size/mse": 2.0, "size/mae": 1.0}


def metrics():
    return {
        "digit": {"accuracy": MulticlassAccuracy(4, average="micro")},
        "size": {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()},
    }


def batches(count=4, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        preds = {
            "digit": torch.rand(size, 4, generator=generator),
            "size": torch.rand(size, generator=generator),
        }
        target = {
            "digit": torch.randint(4, (size,), generator=generator),
            "size": torch.rand(size, generator=generator),
        }
        yield preds, target


def expected(pairs, sign="gain"):
    """Delta_m of all pairs at once, from the definitions of the metrics."""
    preds, target = (
        {task: torch.cat([side[task] for side in sides]) for task in sides[0]}
        for sides in zip(*pairs, strict=True)
    )
    error = preds["size"] - target["size"]
    values = {
        "digit/accuracy": (preds["digit"].argmax(1) == target["digit"]).double().mean(),
        "size/mse": error.double().square().mean(),
        "size/mae": error.double().abs().mean(),
    }
    return delta_m(values, BASELINES, {n: n == "digit/accuracy" for n in values}, sign)


def filled(metric):
    for preds, target in batches():
        metric.update(preds, target)
    return metric


# --- values --------------------------------------------------------------------------------------


def test_by_hand():
    metric = DeltaM(metrics(), BASELINES)
    metric.update(
        {"digit": torch.tensor([0, 1, 2, 3]), "size": torch.tensor([1.0, 2.0])},
        {"digit": torch.tensor([0, 1, 2, 0]), "size": torch.tensor([3.0, 2.0])},
    )
    # accuracy 0.75 of 0.5: +50 %; mse 2 of 2: 0 %; mae 1 of 1: 0 %
    value = metric.compute()
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(50 / 3)


@pytest.mark.parametrize("sign", ["gain", "drop"])
def test_an_epoch_is_not_the_mean_of_its_batches(sign):
    metric = filled(DeltaM(metrics(), BASELINES, sign=sign))
    assert metric.compute().item() == pytest.approx(expected(list(batches()), sign), rel=1e-5)
    assert metric.higher_is_better is (sign == "gain")


FLAT = {
    "digit/accuracy": lambda: MulticlassAccuracy(4, average="micro"),
    "size/mse": MeanSquaredError,
    "size/mae": MeanAbsoluteError,
}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: {name: make() for name, make in FLAT.items()},
        lambda: {task: MetricCollection(inner) for task, inner in metrics().items()},
        lambda: {
            "digit": metrics()["digit"],
            "size": MetricCollection(metrics()["size"], prefix="val/size/", postfix="_"),
        },
        lambda: nn.ModuleDict({task: nn.ModuleDict(inner) for task, inner in metrics().items()}),
    ],
    ids=["flat", "collections", "prefix", "module-dicts"],
)
def test_every_way_to_give_metrics(wrapped):
    metric = filled(DeltaM(wrapped(), BASELINES))
    assert metric.compute().item() == pytest.approx(expected(list(batches())), rel=1e-5)


def test_a_metric_under_a_task_name_has_that_name():
    metric = DeltaM({"size": MeanSquaredError()}, {"size": 2.0})
    metric.update({"size": torch.zeros(2)}, {"size": torch.ones(2)})
    assert metric.compute() == 50.0


@pytest.mark.parametrize("task", ["keys", "type", "a.b", "a/b", "update"])
def test_any_task_name_will_do(task):
    metric = DeltaM({task: {"mse": MeanSquaredError()}}, {f"{task}/mse": 2.0})
    metric.update({task: torch.zeros(2)}, {task: torch.ones(2)})
    assert metric.compute() == 50.0


def test_compute_groups_of_a_collection_count_once():
    inner = MetricCollection(
        {"p": MulticlassPrecision(4), "f1": MulticlassF1Score(4), "a": MulticlassAccuracy(4)}
    )
    reference = inner.clone()
    metric = DeltaM({"digit": inner}, {"digit/p": 0.5, "digit/f1": 0.5, "digit/a": 0.5})
    for k, (preds, target) in enumerate(batches()):
        metric.update({"digit": preds["digit"]}, target)
        reference.update(preds["digit"], target["digit"])
        values = reference.compute()
        improvement = [100 * (v.item() - 0.5) / 0.5 for v in values.values()]
        assert metric.compute().item() == pytest.approx(sum(improvement) / 3, rel=1e-5), k


def test_metrics_function_is_the_functional_one():
    assert lightning_flatmtl.metrics.delta_m is delta_m


# --- directions ----------------------------------------------------------------------------------


def test_directions_can_be_given_or_overridden():
    wrapped = {"a": {"mean": MeanMetric(), "mse": MeanSquaredError()}}
    baselines = {"a/mean": 1.0, "a/mse": 1.0}
    directions = {"a/mean": True, "a/mse": True}
    metric = DeltaM(wrapped, baselines, higher_is_better=directions)
    assert metric._directions == directions


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"'a/mean' \(MeanMetric\) does not say .* pass `higher"):
        DeltaM({"a": {"mean": MeanMetric()}}, {"a/mean": 1.0})


# --- parts of a batch ----------------------------------------------------------------------------


def test_absent_tasks_are_left_out():
    metric = DeltaM(metrics(), BASELINES)
    pairs = list(batches())
    for preds, target in pairs:
        metric.update({"digit": preds["digit"]}, target)
        metric.update({"size": preds["size"]}, {"size": target["size"]})
        metric.update({}, target)
    assert metric.compute().item() == pytest.approx(expected(pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "advice"), [("sise", "did you mean 'size'"), ("angle", "leave it out")]
)
def test_predictions_of_no_task_are_refused(name, advice):
    metric = DeltaM(metrics(), BASELINES)
    preds, target = next(batches())
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match=f"among digit, size, got '{name}'.*{advice}"):
            call({name: preds["size"]}, {name: target["size"]})


def test_a_task_that_was_never_seen_is_left_out_and_told():
    metric = DeltaM(metrics(), BASELINES)
    for preds, target in batches():
        metric.update({"size": preds["size"]}, target)
    with pytest.warns(UserWarning, match="nothing was seen of digit. Update all tasks"):
        found = metric.compute()
    improvement = [
        100 * (1 - metric.units[k].compute().item() / BASELINES[name])
        for k, name in enumerate(BASELINES)
        if name.startswith("size")
    ]
    assert found.item() == pytest.approx(sum(improvement) / 2, rel=1e-5)


def test_a_state_that_was_loaded_was_seen():
    saved, loaded = DeltaM(metrics(), BASELINES), DeltaM(metrics(), BASELINES)
    saved.persistent(True)
    loaded.persistent(True)
    filled(saved)
    loaded.load_state_dict(saved.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        assert torch.equal(loaded.compute(), saved.compute())


def test_a_wrapped_wrapper_was_seen():
    metric = DeltaM(
        {"a": Running(MeanMetric(), window=2)}, {"a": 2.0}, higher_is_better={"a": True}
    )
    metric.update({"a": torch.tensor(3.0)}, {"a": torch.tensor(1.0)})
    assert metric.compute().item() == 50.0


def test_predictions_without_target_are_refused():
    metric = DeltaM(metrics(), BASELINES)
    preds, target = next(batches())
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match=r"`target` must hold every task .* got none for size"):
            call(preds, {"digit": target["digit"]})
    with pytest.raises(TypeError, match="`preds` must be a mapping by task, got Tensor"):
        metric.update(torch.ones(2), target)


def test_forward_gives_the_batch_and_keeps_the_epoch():
    metric = DeltaM(metrics(), BASELINES)
    pairs = list(batches())
    for pair in pairs:
        assert metric(*pair).item() == pytest.approx(expected([pair]), rel=1e-5)
    assert metric.compute().item() == pytest.approx(expected(pairs), rel=1e-5)


def test_forward_on_a_part_is_over_its_metrics():
    metric = DeltaM(metrics(), BASELINES)
    preds, target = {"digit": torch.tensor([0, 1])}, {"digit": torch.tensor([0, 1])}
    assert metric(preds, target) == 100.0
    assert math.isnan(metric({}, {}))


def test_reset():
    metric = filled(DeltaM(metrics(), BASELINES))
    metric.reset()
    pair = next(batches(seed=5))
    metric.update(*pair)
    assert metric.compute().item() == pytest.approx(expected([pair]), rel=1e-5)


# --- sharing -------------------------------------------------------------------------------------


def test_copies_are_the_default():
    wrapped = metrics()
    filled(DeltaM(wrapped, BASELINES))
    assert not wrapped["size"]["mse"].update_called


@pytest.mark.parametrize("collections", [False, True])
def test_shared_metrics_are_updated_elsewhere(collections):
    wrapped = {t: MetricCollection(m) for t, m in metrics().items()} if collections else metrics()
    metric = DeltaM(wrapped, BASELINES, copy=False)
    for preds, target in batches():
        for task, inner in wrapped.items():
            for one in [inner] if collections else inner.values():
                one.update(preds[task], target[task])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().item() == pytest.approx(expected(list(batches())), rel=1e-5)


def test_compute_before_update_is_no_value_and_told():
    with pytest.warns(UserWarning, match="nothing was seen of size"):
        found = DeltaM({"size/mse": MeanSquaredError()}, {"size/mse": 1.0}).compute()
    assert math.isnan(found)


# --- life in torchmetrics and Lightning ----------------------------------------------------------


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, DeltaM.clone, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_clones_are_equal_and_independent(twin):
    metric = filled(DeltaM(metrics(), BASELINES))
    other = twin(metric)
    assert torch.equal(other.compute(), metric.compute())
    other.update(*next(batches(seed=7)))
    assert not torch.equal(other.compute(), metric.compute())
    other.reset()
    assert metric.compute().item() == pytest.approx(expected(list(batches())), rel=1e-5)


def test_state_dict_is_empty_until_asked_for():
    metric = filled(DeltaM(metrics(), BASELINES))
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = DeltaM(metrics(), BASELINES)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.equal(other.compute(), metric.compute())


def test_in_a_collection():
    collection = MetricCollection(
        {
            "gain": DeltaM(metrics(), BASELINES),
            "drop": DeltaM(metrics(), BASELINES, sign="drop"),
            "rows": MultitaskWrapper({"size": MeanSquaredError()}),
        },
        prefix="val/",
    )
    pairs = list(batches())
    for preds, target in pairs:
        collection["val/gain"].update(preds, target)
        collection["val/drop"](preds, target)
    assert collection["val/gain"].compute().item() == pytest.approx(expected(pairs), rel=1e-5)

    collection = MetricCollection(
        {"a": DeltaM(metrics(), BASELINES), "b": DeltaM(metrics(), BASELINES)}
    )
    for preds, target in pairs[:2]:
        collection.update(preds, target)
    for preds, target in pairs[2:]:
        batch = collection(preds=preds, target=target)
        assert batch["a"].item() == pytest.approx(expected([(preds, target)]), rel=1e-5)
    result = collection.clone().compute()
    assert result["a"].item() == result["b"].item() == pytest.approx(expected(pairs), rel=1e-5)
    collection.reset()
    collection.update(*pairs[0])
    assert collection.compute()["b"].item() == pytest.approx(expected(pairs[:1]), rel=1e-5)


class Logs(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.delta = DeltaM(metrics(), BASELINES)
        self.epochs = []

    def validation_step(self, batch, _):
        self.delta(*batch)
        self.log("val/delta_m", self.delta, on_step=True, on_epoch=True, batch_size=16)

    def on_validation_epoch_end(self):
        self.epochs.append(self.delta.compute().item())


def test_lightning_logs_and_resets_it(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Logs()
    for seed in (0, 1):
        loader = torch.utils.data.DataLoader(list(batches(seed=seed)), batch_size=None)
        result = trainer.validate(module, loader, verbose=False)[0]
        want = expected(list(batches(seed=seed)))
        assert result["val/delta_m_epoch"] == pytest.approx(want, rel=1e-5)
    assert module.epochs[1] == pytest.approx(want, rel=1e-5)


# --- published tables ----------------------------------------------------------------------------

TABLES = {
    "nyuv2": (published.NYU_METRICS, published.NYU_STL, published.NYU_ROWS),
    "cityscapes": (published.CITY_METRICS, published.CITY_STL, published.CITY_ROWS),
}


@pytest.mark.parametrize("table", TABLES)
def test_published_rows_come_out_of_the_metric(table):
    """The figures of a table, fed as if they were those of two batches each."""
    names, stl, rows = TABLES[table]
    metric = DeltaM(
        {name: MeanMetric() for name in names},
        dict(zip(names, stl, strict=True)),
        sign="drop",
        higher_is_better={name: name not in published.LOWER_IS_BETTER for name in names},
    )
    for row, printed in rows.values():
        metric.reset()
        for share in (0.9, 1.1):
            values = {n: torch.tensor(v * share) for n, v in zip(names, row, strict=True)}
            metric.update(values, dict.fromkeys(names, torch.tensor(1.0)))
        assert metric.compute().item() == pytest.approx(
            published.published(names, row, stl), abs=1e-3
        )
        assert metric.compute().item() == pytest.approx(printed, abs=0.17)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"baselines": {"size/mse": 1.0}}, "'digit/accuracy' has no baseline; known names: 'size"),
        ({"baselines": {**BASELINES, "x": 1.0}}, "do not exist: 'x'"),
        ({"baselines": {**BASELINES, "size/mae": 0}}, "'size/mae' must be a finite .* not zero"),
        ({"baselines": {**BASELINES, "size/mae": "low"}}, "'size/mae' must be a number, got 'low'"),
        ({"sign": "up"}, '`sign` must be "gain" or "drop", got \'up\''),
        ({"higher_is_better": {"size": True}}, "names metrics that do not exist: size; known"),
        ({"higher_is_better": {"size/mse": "no"}}, "must say True or False for 'size/mse'"),
        ({"metrics": {}}, "needs at least one metric, got none"),
        ({"metrics": {"a": {"b": MeanSquaredError()}, "a/b": MeanSquaredError()}}, "named 'a/b'"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DeltaM(**{"metrics": metrics(), "baselines": BASELINES, **kwargs})


@pytest.mark.parametrize("wrapped", [{"a": nn.ReLU()}, {"a": {"b": 3}}])
def test_only_metrics_can_be_wrapped(wrapped):
    with pytest.raises(TypeError, match=r"`metrics` must hold metrics, got (ReLU|int) for 'a"):
        DeltaM(wrapped, {})


def test_metrics_of_many_numbers_are_refused():
    per_class = MulticlassAccuracy(4, average=None)
    metric = DeltaM({"digit": {"accuracy": per_class}}, {"digit/accuracy": 0.5})
    metric.update(*({"digit": torch.arange(4)} for _ in range(2)))
    with pytest.raises(ValueError, match=r"'digit/accuracy' must be a single number, got shape"):
        metric.compute()

    class Pair(MulticlassAccuracy):
        def compute(self):
            return {"x": super().compute(), "y": super().compute()}

    for wrapped in ({"a": {"b": Pair(4)}}, {"a": MetricCollection({"b": Pair(4)})}):
        metric = DeltaM(wrapped, {"a/b": 1.0})
        metric.update(*({"a": torch.arange(4)} for _ in range(2)))
        with pytest.raises(ValueError, match="Every metric of 'a' must give a single number"):
            metric.compute()


def test_baselines_from_a_file(tmp_path):
    path = tmp_path / "stl.yaml"
    path.write_text("digit: {accuracy: 0.5}\nsize:\n  mse: 2\n  mae: 1e0\n")
    metric = filled(DeltaM(metrics(), path))
    assert metric.baselines == BASELINES
    assert metric.compute().item() == pytest.approx(expected(list(batches())), rel=1e-5)


# --- two processes -------------------------------------------------------------------------------

DDP_BASELINES = {**BASELINES, "size/rank": 0.5}


def ddp_metrics():
    wrapped = metrics()
    wrapped["size"]["rank"] = SpearmanCorrCoef()  # keeps lists of samples, not sums
    return {"digit": wrapped["digit"], "size": MetricCollection(wrapped["size"])}


def _worker(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        metric = DeltaM(ddp_metrics(), DDP_BASELINES)
        for index, pair in enumerate(batches()):
            if index % 2 == rank:
                metric.update(*pair)
        first = metric.compute()
        again = metric.compute()  # the local states are back, the result is the same
        metric.update(*next(batches(count=1, seed=10 + rank)))
        last = metric.compute()
        apart = DeltaM(metrics(), BASELINES)  # each process has one of the tasks
        preds, target = next(batches())
        task = ["digit", "size"][rank]
        apart.update({task: preds[task]}, target)
        torch.save([first, again, last, apart.compute()], f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _spawn(folder, tries=3):
    """Run both ranks; gloo now and then aborts a process at its exit, which proves nothing."""
    for attempt in range(tries):
        try:
            return mp.spawn(_worker, args=(str(folder / f"store{attempt}"), str(folder)), nprocs=2)
        except mp.ProcessExitedException:
            if attempt == tries - 1:
                raise
    return None


@pytest.mark.ddp
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")
def test_two_processes_equal_one(tmp_path):
    _spawn(tmp_path)
    metric = filled(DeltaM(ddp_metrics(), DDP_BASELINES))
    once = metric.compute()
    for seed in (10, 11):
        metric.update(*next(batches(count=1, seed=seed)))
    more = metric.compute()
    for rank in range(2):
        first, again, last, apart = torch.load(tmp_path / f"{rank}.pt")
        assert apart.item() == pytest.approx(expected([next(batches())]), rel=1e-5)
        torch.testing.assert_close(first, once)
        torch.testing.assert_close(again, once)
        torch.testing.assert_close(last, more)
