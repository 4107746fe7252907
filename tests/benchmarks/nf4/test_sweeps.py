"""What is kept of a run beside the real Unsloth: ours as the value, theirs as baselines, ratios of neighbours."""

import pytest

from benchmarks.nf4.sweeps import add_unsloth
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

PEER = {
    "version": "1.2",
    "device_us": {
        "8x8 float16": {
            "ours": [2.0, 1.5, 2.5],
            "unsloth": [3.0, 2.9, 3.1],
            "unsloth, three launches": [4.0, 3.9, 4.1],
        }
    },
    "enqueue_us": {"8x8 float16": {"ours": [1.0, 0.9, 1.1], "unsloth": [5.0, 4.9, 5.1]}},
    "harness_s": {"ours": [1.0, 2.0, 4.0], "unsloth": [2.0, 2.0, 12.0]},
}


def test_records_beside_unsloth(tmp_path):
    found = Measurements(tmp_path / "a.json", probe(measure=False))
    add_unsloth(found, PEER)
    (device,) = found.find("device_us_beside_unsloth", "8x8 float16")
    assert (device["value"], device["low"], device["high"]) == (2.0, 1.5, 2.5)
    assert device["baselines"] == {"Unsloth 1.2": 3.0, "Unsloth 1.2, three launches": 4.0}
    (enqueue,) = found.find("host_enqueue_us_beside_unsloth")
    assert enqueue["value"] == 1.0 and enqueue["baselines"] == {"Unsloth 1.2": 5.0}
    (ratio,) = found.find("harness_speedup_beside_unsloth", "all, against Unsloth 1.2")
    assert ratio["value"] == 2.0  # the median of 2, 1 and 3, each of two neighbours
    assert (ratio["low"], ratio["high"]) == pytest.approx((1.2, 2.8))
