"""The benchmark of the 4-bit layer: its arithmetic, and that it runs here and gives records that can be kept."""

import pytest
import torch

from benchmarks.nf4 import decoding
from benchmarks.nf4.decoding import crossover, measure
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ({1: 2, 8: 2, 64: 2}, {1: 1, 8: 2, 64: 3}, 8),
        ({1: 1, 8: 3, 64: 2}, {1: 2, 8: 2, 64: 3}, 64),  # faster, slower, faster: only the last stretch counts
        ({1: 1, 8: 1}, {1: 2, 8: 2}, 1),
        ({1: 1, 8: 3}, {1: 2, 8: 2}, None),
    ],
)
def test_crossover_is_where_ours_stops_being_slower(ours, theirs, expected):
    assert crossover(ours, theirs) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the notebook runs it, on shapes that take minutes")
@pytest.mark.slow
def test_every_metric_is_measured_and_can_be_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "TINY_SHAPES", {(32, 64): 2})
    hardware = probe(measure=False)
    kept = Measurements(tmp_path / "a.json", hardware)
    for record in measure(hardware, quick=True):
        kept.add(**record)  # refuses NaN, duplicates and unknown keys
        assert record["value"] > 0 and (
            record["metric"] == "linear_crossover_rows" or record["baselines"]["bitsandbytes"] > 0
        )
    promised = {line.split()[0] for line in measure.__doc__.splitlines() if line.startswith("        ")}
    assert {record["metric"] for record in kept.records} | {"linear_crossover_rows"} == promised
