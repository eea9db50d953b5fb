import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.regression import MeanSquaredError

from lightning_flatmtl.functional.delta_m import check_delta_m, delta_m, relative_improvement
from lightning_flatmtl.metrics import DeltaM

UP = {"a": True, "b": False}
BASE = {"a": 0.5, "b": 4.0}

# --- published tables, lower is better -----------------------------------------------------------
# Navon et al., 2022 (arXiv:2202.01017), Tables 2 and 3; rows F-X: Phan et al. (arXiv:2211.13723v4),
# which repeats the others.

NYU_METRICS = ("miou", "pixel", "abs", "rel", "mean", "median", "11.25", "22.5", "30")
NYU_STL = (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15)
NYU_ROWS = {
    "LS": ((39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08), 5.59),
    "SI": ((38.45, 64.27, 0.5354, 0.2201, 27.60, 23.37, 22.53, 48.57, 62.32), 4.39),
    "RLW": ((37.17, 63.77, 0.5759, 0.2410, 28.27, 24.18, 22.26, 47.05, 60.62), 7.78),
    "DWA": ((39.11, 65.31, 0.5510, 0.2285, 27.61, 23.18, 24.17, 50.18, 62.39), 3.57),
    "UW": ((36.87, 63.17, 0.5446, 0.2260, 27.04, 22.61, 23.54, 49.05, 63.65), 4.05),
    "MGDA": ((30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36), 1.38),
    "PCGrad": ((38.06, 64.64, 0.5550, 0.2325, 27.41, 22.80, 23.86, 49.83, 63.14), 3.97),
    "GradDrop": ((39.39, 65.12, 0.5455, 0.2279, 27.48, 22.96, 23.38, 49.44, 62.87), 3.58),
    "CAGrad": ((39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58), 0.20),
    "IMTLG": ((39.35, 65.60, 0.5426, 0.2256, 26.02, 21.19, 26.20, 53.13, 66.24), -0.76),
    "NashMTL": ((40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15), -4.04),
    "F-MGDA": ((26.42, 58.78, 0.6078, 0.2353, 24.34, 18.45, 31.64, 58.86, 70.50), -0.33),
    "F-PCGrad": ((40.05, 65.42, 0.5429, 0.2243, 27.38, 23.00, 23.47, 49.35, 62.74), 3.14),
    "F-CAGrad": ((40.93, 66.68, 0.5285, 0.2162, 25.43, 20.39, 27.99, 54.82, 67.56), -3.78),
    "F-IMTL": ((40.42, 65.61, 0.5389, 0.2121, 25.03, 19.75, 28.90, 56.19, 68.72), -4.77),
}
CITY_METRICS = ("miou", "pixel", "abs", "rel")
CITY_STL = (74.01, 93.16, 0.0125, 27.77)
CITY_ROWS = {
    "LS": ((75.18, 93.49, 0.0155, 46.77), 22.60),
    "SI": ((70.95, 91.73, 0.0161, 33.83), 14.11),
    "RLW": ((74.57, 93.41, 0.0158, 47.79), 24.38),
    "DWA": ((75.24, 93.52, 0.0160, 44.37), 21.45),
    "UW": ((72.02, 92.85, 0.0140, 30.13), 5.89),
    "MGDA": ((68.84, 91.54, 0.0309, 33.50), 44.14),
    "PCGrad": ((75.13, 93.48, 0.0154, 42.07), 18.29),
    "GradDrop": ((75.27, 93.53, 0.0157, 47.54), 23.73),
    "CAGrad": ((75.16, 93.48, 0.0141, 37.60), 11.64),
    "IMTLG": ((75.33, 93.49, 0.0135, 38.41), 11.10),
    "NashMTL": ((75.41, 93.66, 0.0129, 35.02), 6.82),
    "F-MGDA": ((73.77, 93.12, 0.0129, 27.44), 0.67),
    "F-CAGrad": ((76.02, 93.72, 0.0134, 34.64), 7.25),
    "F-IMTL": ((76.63, 93.76, 0.0124, 31.17), 1.87),
}
LOWER_IS_BETTER = {"abs", "rel", "mean", "median"}


def published(metrics, row, stl):
    directions = {name: name not in LOWER_IS_BETTER for name in metrics}
    values, baselines = dict(zip(metrics, row, strict=True)), dict(zip(metrics, stl, strict=True))
    return delta_m(values, baselines, directions, sign="drop")


@pytest.mark.parametrize("method", NYU_ROWS)
def test_published_nyuv2_rows(method):
    row, printed = NYU_ROWS[method]
    # The printed metrics are rounded: worth 0.01 here. Those of IMTL-G give -0.60, not -0.76.
    within = 0.17 if method == "IMTLG" else 0.01
    assert published(NYU_METRICS, row, NYU_STL) == pytest.approx(printed, abs=within)


@pytest.mark.parametrize("method", CITY_ROWS)
def test_published_cityscapes_rows(method):
    row, printed = CITY_ROWS[method]
    # A depth error printed as 0.0125 stands for anything up to 0.4 % away: worth 0.1 here.
    assert published(CITY_METRICS, row, CITY_STL) == pytest.approx(printed, abs=0.11)


# --- by hand and by property ---------------------------------------------------------------------


def test_by_hand():
    values = {"a": 0.6, "b": 5.0}  # +20 % where higher is better, 25 % worse where lower is
    assert relative_improvement(values, BASE, UP) == pytest.approx({"a": 20.0, "b": -25.0})
    assert delta_m(values, BASE, UP) == pytest.approx(-2.5)
    assert delta_m(values, BASE, UP, sign="drop") == pytest.approx(2.5)


def test_the_mean_is_over_metrics_not_tasks():
    values = {"x/1": 2.0, "x/2": 2.0, "x/3": 2.0, "y/1": 1.0}
    ones, up = dict.fromkeys(values, 1.0), dict.fromkeys(values, True)
    assert delta_m(values, ones, up) == pytest.approx(75.0)


@pytest.mark.parametrize(
    "value", [torch.tensor(0.75), torch.tensor([0.75]), torch.tensor(0.75).double()]
)
def test_tensors_are_values(value):
    assert delta_m({"a": value}, {"a": 0.5}, {"a": True}) == 50.0


def test_a_negative_baseline_keeps_better_positive():
    assert delta_m({"a": -0.5}, {"a": -1.0}, {"a": True}) == 50.0
    assert delta_m({"a": -0.5}, {"a": -1.0}, {"a": False}) == -50.0


def test_nan_shows():
    assert math.isnan(delta_m({"a": math.nan, "b": 1.0}, BASE, UP))


def test_directions_of_other_metrics_do_not_matter():
    assert delta_m({"a": 0.6}, {"a": 0.5}, UP) == pytest.approx(20.0)


positive = st.floats(1e-3, 1e3)


@settings(deadline=None)  # shared machines pause
@given(st.lists(st.tuples(positive, positive, st.booleans(), st.floats(1e-2, 1e2)), min_size=1))
def test_properties(rows):
    names = [f"task/{i}" for i in range(len(rows))]
    values, baselines, directions, units = (
        dict(zip(names, column, strict=True)) for column in zip(*rows, strict=True)
    )
    gain = delta_m(values, baselines, directions)
    close = {"rel": 1e-9, "abs": 1e-6}
    assert delta_m(baselines, baselines, directions) == 0.0
    assert delta_m(values, baselines, directions, sign="drop") == -gain
    flipped = {name: not up for name, up in directions.items()}
    assert delta_m(values, baselines, flipped) == pytest.approx(-gain, **close)
    scaled = [{k: v[k] * units[k] for k in v} for v in (values, baselines)]
    assert delta_m(*scaled, directions) == pytest.approx(gain, **close)
    backwards = {name: values[name] for name in reversed(names)}
    assert delta_m(backwards, baselines, directions) == gain
    better = {k: v * (1.1 if directions[k] else 0.9) for k, v in values.items()}
    assert delta_m(better, baselines, directions) > gain


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "baselines", "directions", "message"),
    [
        ({}, {}, {}, "needs at least one metric, got none"),
        ({"a": 1.0, "c": 1.0}, BASE, UP, "'c' has no baseline; known names: 'a', 'b'"),
        ({"a": 1.0}, {}, UP, "'a' has no baseline; known names: none"),
        ({"a": 1.0}, BASE, UP, "do not exist: 'b'; known names: 'a'"),
        ({"a": 1.0}, {"a": 0.0}, UP, "baseline of 'a' must be a finite .* not zero, got 0.0"),
        ({"a": 1.0}, {"a": math.nan}, UP, "not zero, got nan"),
        ({"a": 1.0}, {"a": -math.inf}, UP, "not zero, got -inf"),
        ({"a": 1.0}, {"a": "high"}, UP, "not zero, got high"),
        ({"a": 1.0}, {"a": 1.0}, {}, "must say True or False for 'a', got None"),
        ({"a": 1.0}, {"a": 1.0}, {"a": 1}, "must say True or False for 'a', got 1"),
        ({"a": torch.ones(3)}, {"a": 1.0}, UP, r"'a' must be a single number, got shape \[3\]"),
        ({"a": "high"}, {"a": 1.0}, UP, "'a' must be a single number, got 'high'"),
    ],
)
def test_bad_input_is_refused(values, baselines, directions, message):
    with pytest.raises(ValueError, match=message):
        delta_m(values, baselines, directions)


def test_unknown_sign_is_refused():
    with pytest.raises(ValueError, match='`sign` must be "gain" or "drop", got \'up\''):
        delta_m({"a": 1.0}, {"a": 1.0}, UP, sign="up")


def test_baselines_are_checked_before_there_are_values():
    check_delta_m(["a", "b"], BASE, UP)
    with pytest.raises(ValueError, match="'c' has no baseline"):
        check_delta_m(["a", "b", "c"], BASE, UP)


def test_infinite_values_of_both_signs_have_no_mean():
    values = {"a": math.inf, "b": math.inf, "c": 1.0}
    directions = {"a": True, "b": False, "c": True}
    with pytest.raises(ValueError, match="where 'a' is infinitely better .* and 'b' infinitely"):
        delta_m(values, dict.fromkeys(values, 1.0), directions)
    assert delta_m(values, dict.fromkeys(values, 1.0), dict.fromkeys(values, True)) == math.inf


def test_a_mean_of_large_values_is_finite():
    values = {"a": 1e306, "b": 1e306, "c": 1e306}
    found = delta_m(values, dict.fromkeys(values, 1.0), dict.fromkeys(values, True))
    assert found == pytest.approx(1e308)


def test_one_direction_for_all_is_refused():
    with pytest.raises(ValueError, match=r"by its name, such as \{\"seg/miou\": True\}, got True"):
        delta_m({"a": 1.0}, {"a": 1.0}, True)
    with pytest.raises(ValueError, match="of every metric by its name"):
        DeltaM({"a": MeanSquaredError()}, {"a": 1.0}, higher_is_better=True)
