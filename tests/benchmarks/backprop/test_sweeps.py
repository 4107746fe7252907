"""The sweeps as a file: every candidate at every size."""

import pytest
import torch

from benchmarks.backprop.baselines import COMPILED, EAGER, FLOOR
from benchmarks.backprop.linear_losses import OURS_ALL_ROWS
from benchmarks.backprop.sweeps import HEADS, measure
from benchmarks.backprop.workload import TINY
from unsloth_puzzles.bench.record import Measurements


@pytest.mark.skipif(torch.cuda.is_available(), reason="peaks are the CPU's here")
@pytest.mark.slow
def test_every_candidate_at_every_size_is_in_the_file(tmp_path):
    path = tmp_path / "some_sweeps.json"
    options = {"sizes": (64, 250), "vocabularies": (256, 1024), "compile": False, "without": (COMPILED,), "rounds": 1}
    measured = measure(path, TINY, "cpu", **options)
    for metric, cases in (
        ("frontier", [f"{head}, {size} rows" for head in HEADS for size in (64, 250)]),
        ("vocabulary", ["vocabulary 256", "vocabulary 1024"]),
    ):
        for unit in ("ms", "peak_gib"):
            found = measured.find(f"{metric}_{unit}")
            assert [one["case"] for one in found] == cases
            assert all(set(one["baselines"]) == {EAGER, FLOOR} for one in found)
    for unit in ("ms", "peak_gib"):
        found = measured.find(f"ignored_{unit}")
        assert [one["case"] for one in found] == [f"{head}, 80% of the rows without a label" for head in HEADS]
        assert all(set(one["baselines"]) == {EAGER, OURS_ALL_ROWS} for one in found)
    small, large = (one["value"] for one in measured.find("vocabulary_peak_gib"))
    assert small < large
    assert [(one["value"], one["case"]) for one in measured.find("rows")] == [(1000, "hidden size 64, float32")]
    assert Measurements.load(path).records == measured.records
