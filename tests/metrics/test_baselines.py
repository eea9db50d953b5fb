import json

import numpy as np
import pytest
import torch

from lightning_flatmtl.metrics import load_baselines

FLAT = {"left/accuracy": 0.95, "right/accuracy": 0.9}


def test_a_mapping_is_copied_and_made_float():
    given = {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0)}
    loaded = load_baselines(given)
    assert loaded == {"a": 1.0, "b": 0.5, "c": 2.0}
    assert all(type(value) is float for value in loaded.values())
    assert loaded is not given


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flat.yaml", "left/accuracy: 0.95\nright/accuracy: 0.9\n"),
        ("nested.yml", "left:\n  accuracy: 95e-2\nright: {accuracy: .9}\n"),
        ("flat.json", json.dumps(FLAT)),
        ("nested.json", json.dumps({"left": {"accuracy": 0.95}, "right/accuracy": 0.9})),
    ],
)
def test_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert load_baselines(path) == FLAT
    assert load_baselines(str(path)) == FLAT


@pytest.mark.parametrize("number", ["1e-3", "1E-3", ".1e-2", "0.001", "+1.e-3"])
def test_every_way_to_write_a_number_in_yaml(tmp_path, number):
    path = tmp_path / "b.yaml"
    path.write_text(f"a: {number}\n")
    assert load_baselines(path) == {"a": 0.001}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file of baselines at .*none\.yaml"):
        load_baselines(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.yaml", "- 1\n- 2\n", "must hold a mapping from metric name to value, got list"),
        ("b.yaml", "", "must hold a mapping from metric name to value, got NoneType"),
        ("b.yaml", "a: [1\n", "cannot be parsed"),
        ("b.json", "{a: 1}", "cannot be parsed"),
        ("b.yaml", "a: high\n", "baseline of 'a' must be a number, got 'high'"),
        ("b.yaml", "a: '0.9'\n", "baseline of 'a' must be a number, got '0.9'"),
        ("b.yaml", "a: true\n", "baseline of 'a' must be a number, got True"),
        ("b.yaml", "a: {b: }\n", "baseline of 'a/b' must be a number, got None"),
        ("b.yaml", "normal: {11.25: 0.3}\n", "must be strings, got 11.25 under 'normal/': put it"),
        ("b.yaml", "a/b: 1\na: {b: 2}\n", "baseline of 'a/b' is given twice"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_baselines(path)


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("flat.yaml", "a/x: 1.0\nb/x: 2.0\na/x: 3.0\n", "a/x"),
        ("block.yaml", "a:\n  x: 1.0\nb:\n  x: 2.0\na:\n  y: 3.0\n", "a"),
        ("inner.yaml", "a:\n  x: 1.0\n  x: 2.0\n", "x"),
        ("flow.yaml", "{a: {x: 1.0, x: 2.0}}", "x"),
        ("flat.json", '{"a/x": 1.0, "a/x": 2.0}', "a/x"),
        ("block.json", '{"a": {"x": 1.0}, "b": {"x": 1.0}, "a": {"y": 2.0}}', "a"),
    ],
)
def test_equal_keys_of_a_file_are_refused(tmp_path, name, text, key):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"'{key}' is given twice in the same mapping"):
        load_baselines(tmp_path / name)


def test_a_merged_block_may_be_overridden(tmp_path):
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1.0, y: 2.0}\nb:\n  <<: *a\n  x: 3.0\n")
    expected = {"a/x": 1.0, "a/y": 2.0, "b/y": 2.0, "b/x": 3.0}
    assert load_baselines(tmp_path / "merged.yaml") == expected
