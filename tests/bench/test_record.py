"""The JSON files of measurements: their form, what is refused, and that a file is written whole or not at all."""

import json
import os

import numpy
import pytest

from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

MACHINE = Hardware("test", "cuda", 90, 1, 8.0, 2, 1, True, False, copy_bandwidth=1e12)


@pytest.fixture
def measurements(tmp_path) -> Measurements:
    return Measurements(tmp_path / "folder" / "a.json", MACHINE)


def test_saved_file_has_provenance_and_records(measurements):
    measurements.add("speedup", "2048x8192 fp16", 1.9, "x", low=1.8, high=2.0, baselines={"bnb": 1.0})
    measurements.add("mismatched_weights", "fp16", numpy.int64(0), "weights")
    content = json.loads(measurements.save().read_text())
    assert list(content) == ["hardware", "versions", "date", "digest", "records"]
    assert content["hardware"]["name"] == "test" and content["hardware"]["copy_bandwidth"] == 1e12
    assert content["digest"] == code_digest(package_files())
    assert "torch" in content["versions"] and len(content["date"]) == len("2026-01-31")
    assert content["records"] == [
        {
            "metric": "speedup",
            "case": "2048x8192 fp16",
            "value": 1.9,
            "unit": "x",
            "low": 1.8,
            "high": 2.0,
            "baselines": {"bnb": 1.0},
        },
        {
            "metric": "mismatched_weights",
            "case": "fp16",
            "value": 0,
            "unit": "weights",
            "low": None,
            "high": None,
            "baselines": {},
        },
    ]


def test_load_and_save_round_trip_to_the_same_bytes(measurements):
    measurements.add("time", "one", 1.5, "us", low=1, high=2, baselines={"other": 3})
    path = measurements.save()
    text = path.read_text()
    loaded = Measurements.load(path)
    assert loaded.hardware["name"] == "test" and loaded.find("time", "one")[0]["baselines"] == {"other": 3}
    loaded.save()
    assert path.read_text() == text


def test_find_selects_by_metric_and_case(measurements):
    for metric, case in (("a", "1"), ("a", "2"), ("b", "1")):
        measurements.add(metric, case, 1, "x")
    assert [found["case"] for found in measurements.find("a")] == ["1", "2"]
    assert [found["metric"] for found in measurements.find("b", "1")] == ["b"]
    assert measurements.find("c") == measurements.find("b", "2") == []


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["value", "low", "high", "baselines"])
def test_numbers_that_are_not_finite_are_refused(measurements, field, wrong):
    fields = {"value": 1.0, field: {"other": wrong} if field == "baselines" else wrong}
    with pytest.raises(ValueError, match=f"{field}.* must be a finite number, got {wrong}"):
        measurements.add("a", "1", unit="x", **fields)
    assert measurements.records == []


def test_bad_fields_are_refused(measurements):
    measurements.add("a", "1", 1, "x")
    with pytest.raises(ValueError, match="second time"):
        measurements.add("a", "1", 2, "x")
    with pytest.raises(TypeError, match="value must be a number, got '2'"):
        measurements.add("a", "2", "2", "x")
    with pytest.raises(TypeError, match="unit must be a text that is not empty, got ''"):
        measurements.add("a", "2", 2, "")
    with pytest.raises(ValueError, match=r"low must be at most high, 1\.0, got 3\.0"):
        measurements.add("a", "2", 2, "x", low=3.0, high=1.0)
    with pytest.raises(TypeError, match=r"baselines must be a mapping of names to numbers, got \[1\]"):
        measurements.add("a", "2", 2, "x", baselines=[1])
    assert len(measurements.records) == 1


@pytest.mark.parametrize("change", ["extra file key", "missing file key", "extra key", "missing key", "twice", "NaN"])
def test_load_refuses_other_keys_and_bad_records(measurements, change):
    measurements.add("a", "1", 1, "x")
    path = measurements.save()
    content = json.loads(path.read_text())
    record = content["records"][0]
    if change == "extra file key":
        content["comment"] = ""
    elif change == "missing file key":
        del content["date"]
    elif change == "extra key":
        record["ours"] = 1
    elif change == "missing key":
        del record["baselines"]
    elif change == "twice":
        content["records"].append(record)
    else:
        record["value"] = float("nan")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must (have exactly|be a new pair|be a finite)"):
        Measurements.load(path)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("hardware", {}, r"^hardware in .* must have a name and a device, got \{\}$"),
        ("hardware", None, r"^hardware in .* must have a name and a device, got None$"),
        ("date", 2026, r"^date and records in .* must be a text and a list, got 2026 and \[\]$"),
        ("records", {}, r"^date and records in .* must be a text and a list, got '.*' and \{\}$"),
    ],
)
def test_load_refuses_values_of_other_kinds(measurements, key, value, error):
    path = measurements.save()
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=error):
        Measurements.load(path)


def test_load_names_a_file_that_is_no_json(measurements):
    path = measurements.save()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"\.json must be JSON, got Expecting"):
        Measurements.load(path)


def test_interrupted_save_leaves_the_old_file_alone(measurements, monkeypatch):
    path = measurements.save()
    before = path.read_text()
    measurements.add("a", "1", 1, "x")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measurements.save()
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_files_from_before_the_digest_say_null(measurements):
    path = measurements.save()
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": None}))
    assert Measurements.load(path).digest is None
