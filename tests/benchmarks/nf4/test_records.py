"""What is recorded of the harness and shown beside Unsloth, and the comparison of bits."""

import pytest
import torch

from benchmarks.nf4 import exactness
from benchmarks.nf4.harness import OFFICIAL
from benchmarks.nf4.records import add_harness, beside_unsloth
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.build import PLAIN


@pytest.fixture
def results(tmp_path):
    return Measurements(tmp_path / "a.json", probe(measure=False))


def test_the_harness_compares_neighbours(results):
    ours, theirs = [1.0, 2.0, 4.0], [2.0, 2.0, 12.0]
    seconds = {name: dict.fromkeys(OFFICIAL, values) for name, values in (("ours", ours), ("three", theirs))}
    cases = [case for case, *_ in add_harness(results, seconds, "three", rounds=1000)]
    assert cases == ["2048x8192 fp16", "1024x4096 bf16", "4096x14336 bf16", "all"]
    (ratio,) = results.find("official_harness_speedup", "all")
    assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((2.0, 1.2, 2.8))
    (us,) = results.find("official_harness_us", "all")
    assert us["value"] == pytest.approx(6000) and us["baselines"] == {"three": pytest.approx(6000)}
    (us,) = results.find("official_harness_us", "1024x4096 bf16")
    assert us["value"] == pytest.approx(2000)


def test_a_table_beside_unsloth_has_a_column_for_each_of_its_paths(results):
    assert beside_unsloth(results) == ""
    others = {"Unsloth 1": 6.0, "Unsloth 1, three launches": 8.0}
    results.add("device_us_beside_unsloth", "4096x14336 bfloat16", 4.0, "us", None, None, others)
    results.add("harness_speedup_beside_unsloth", "all, against Unsloth 1", 1.25, "x")
    lines = beside_unsloth(results).splitlines()
    assert lines[0] == "| speed-up of ours over | Unsloth 1 | Unsloth 1, three launches |"
    assert lines[2:] == ["| the harness, wall clock | 1.25x | - |", "| GPU time, 4096x14336 bf16 | 1.50x | 2.00x |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_a_reference_that_differs_is_seen():
    shapes = [(1, 1), (5, 64)]
    same = exactness.compare(PLAIN, torch.float16, shapes, "cpu", [dequantize_nf4])
    assert same.mismatched == 0 < same.flushed and same.cases == 2 * 4 * 3
    wrong = exactness.compare(PLAIN, torch.float16, shapes, "cpu", [lambda *given: -dequantize_nf4(*given)])
    assert wrong.mismatched > 0
