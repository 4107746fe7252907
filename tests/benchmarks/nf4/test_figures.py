"""Challenge A's figures: what they say is what the records say, whoever wins."""

import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks.nf4 import figures
from benchmarks.nf4.ablation import NO_HINTS, UNALIGNED, VARIANTS, faster_than_default, summary
from benchmarks.nf4.baselines import THREE_LAUNCHES
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.bench.timing import Timing

WHERE = "some GPU, 2026-01-01"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "resources")
    yield Measurements(tmp_path / "a.json", probe(measure=False))
    plt.close("all")


def test_bandwidth_merges_lines_that_coincide(results, tmp_path):
    for size, us in ((1024, 10.0), (2048, 20.0)):
        others = {THREE_LAUNCHES: 2 * us, "bitsandbytes": 2.01 * us, "PEFT": 4 * us}
        results.add("sweep_device_us", f"{size}x{size} fp16", us, "us", us, us, others)
    moved = (2 + 1 / 2 + 1 / 64 + 4 / 16384) * 2**22
    figure = figures.bandwidth(results, moved / 20e-6, WHERE)
    (axes,) = figure.axes
    labels = {text.get_text() for text in axes.texts}
    assert {"ours", "three launches, bitsandbytes", "PEFT"} <= labels
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(100)
    assert "ours reaches 100 %" in axes.get_title() and "three launches 50 %" in axes.get_title()
    assert WHERE in axes.get_title() and "random weights" in axes.get_title()
    assert (tmp_path / "resources" / "a_nf4_bandwidth.png").exists()


def test_speedup_has_a_bar_for_each_matrix_and_the_harness(results):
    results.add("speedup_vs_unsloth_device", "8x8 fp16", 0.5, "x", 0.4, 0.6)
    results.add("official_harness_speedup", "8x8 fp16", 9.0, "x", 8.0, 10.0)
    results.add("official_harness_speedup", "all", 2.0, "x", 1.9, 2.1)
    (axes,) = figures.speedup(results, WHERE).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 2.0]
    assert "an imitation of Unsloth's three launches: 0.50x to 2.00x" in axes.get_title()


def test_contraction_says_how_much_and_where(results):
    exact = torch.ones(16, 64)
    contracted = exact.clone()
    contracted[::2] = torch.nextafter(contracted[::2], torch.tensor(2.0))
    (axes,) = figures.contraction(exact, contracted, WHERE).axes
    assert "50.0 % of the weights, by at most 1 ulps" in axes.get_title()
    assert any("50.0 % to 50.0 %" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("other, said", [(2.0, "No exact variant is"), (0.5, "1 exact variant is")])
def test_ablation_names_no_winner_that_is_not_exact(results, other, said):
    timings = {name: Timing(1.0, 0.9, 1.1, 5) for name in [*VARIANTS, UNALIGNED]}
    timings["plain Triton", "contraction allowed (not exact)"] = Timing(0.1, 0.1, 0.1, 5)
    timings[UNALIGNED] = Timing(other, other, other, 5)
    figure = figures.ablation({"a shape": timings}, WHERE)
    assert figure.get_suptitle().startswith(said)
    assert len(faster_than_default(timings)) == (other < 1)
    assert summary(timings)[1].endswith("none") == (other > 1)
    timings[NO_HINTS] = Timing(1.2, 1.1, 1.32, 5)
    assert summary(timings)[0] == "without eviction hints 1.200x the default's time (1.000 to 1.467)"


def test_linear_says_from_which_rows_on_ours_is_not_slower(results):
    for rows, us in ((1, 9.0), (4, 9.0), (64, 9.0)):
        results.add(
            "linear_us",
            f"one block of a model float16, {rows} rows",
            us,
            "us",
            None,
            None,
            {"bitsandbytes": 5.0 * rows},
        )
    results.add("linear_crossover_rows", "one block of a model float16", 4, "rows")
    (axes,) = figures.linear(results, WHERE).axes
    assert axes.get_title().startswith("From 4 rows on ours is not slower")
    assert axes.get_title().splitlines()[1].startswith("float16, no gradients")
    assert list(axes.lines[0].get_xdata()) == [1, 4, 64]
