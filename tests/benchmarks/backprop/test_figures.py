"""Tables and figures of challenge E say what was measured, and who is faster at equal memory."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.backprop import plain_losses
from benchmarks.backprop.baselines import FLOOR, LIGER
from benchmarks.backprop.figures import (
    curve_figure,
    error_table,
    frontier_figure,
    grpo_memory_figure,
    head_table,
    reward_figure,
    time_at_equal_memory,
    vocabulary_table,
)
from benchmarks.backprop.linear_losses import OURS, Measured, liger_rows
from benchmarks.backprop.workload import REFERENCE, TINY
from unsloth_puzzles.bench.timing import Timing


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def points(liger):
    ours = {256: (1.0, 100.0), 512: (2.0, 50.0), 1024: (4.0, 25.0)}
    return [(size, {OURS: at, FLOOR: at, LIGER: liger, "eager": (20.0, 90.0)}) for size, at in ours.items()]


@pytest.mark.parametrize(
    "liger, ratio",
    [((2.0, 40.0), 1.25), ((1.0, 100.0), 1.0), ((4.0, 50.0), 0.5), ((2**1.5, 50 / 2**0.5), 1.0), ((0.5, 10.0), None)],
)
def test_time_at_equal_memory_lies_between_our_nearest_chunk_sizes(liger, ratio):
    assert time_at_equal_memory(points(liger)) == (None if ratio is None else pytest.approx(ratio))


def test_frontier_says_who_is_faster_at_equal_memory():
    by_head = {"head trained": points((2.0, 40.0)), "head frozen": points((4.0, 50.0))}
    title = frontier_figure(by_head, "GPU, date").get_suptitle()
    assert "head trained, Liger is faster by 25%; head frozen, ours is faster by 100%" in title
    assert "not compared" in frontier_figure({"head": points((0.1, 9.0))}, "GPU").get_suptitle()


def test_tables_leave_a_cell_empty_where_nothing_was_measured():
    time = Timing(2000.0, 1000.0, 3000.0, 5)
    table = head_table({"trained": {OURS: Measured(1.5, time)}, "frozen": {}}).splitlines()
    assert table[2] == f"| {OURS} | 1.5 | 2.0 (1.0 to 3.0) |  |  |"
    assert table[0] == "| candidate | trained, GiB | ms (10 % to 90 %) | frozen, GiB | ms (10 % to 90 %) |"
    assert head_table({}) == head_table({"trained": {}}) == "No candidate was measured."
    errors = error_table({OURS: {"hidden_states": 0.1, "weight": 0.2, "loss": 0.3}}).splitlines()
    assert errors[0] == "| relative error | dX | dW | loss |"
    assert errors[2] == f"| {OURS} | 1.00e-01 | 2.00e-01 | 3.0e-01 |"
    assert error_table({}) == "No candidate's error was measured."
    assert vocabulary_table([(8, {OURS: (1.0, 2.0)})], (OURS, LIGER)).splitlines()[2] == "| 8 | 1.00 GiB, 2.0 ms |  |"


def test_curves_and_grpo_say_their_message():
    curve = {"losses": [2.0, 1.0], "dtype": "float32"}
    curves = {("full", "standard"): curve, ("full", "ours"): curve}
    gaps = {"full": [0.0, 1e-6]}
    title = curve_figure(curves, {"full": "full"}, gaps, gaps, {"fault": [1.0]}, "GPU, date").get_suptitle()
    assert "1.0e-06 (full)" in title and title.endswith("GPU, date")
    (axes,) = reward_figure({"TRL": {"reward": [0.1, 0.2]}, "ours": {"reward": [0.1, 0.2]}}, 1, "GPU").axes
    assert "first 1 of 2 steps" in axes.get_title()
    found = {name: {"peak_gib": gib, "time": Timing(1.0, 1.0, 1.0, 1)} for name, gib in (("ours", 1.0), ("TRL", 2.0))}
    found["full logits"] = {**found["ours"], "peak_gib": 10.0}
    found["ours, logits kept"] = {**found["ours"], "peak_gib": 3.0}
    title = grpo_memory_figure({"head only": found, "whole step": found}, "ours", "GPU").get_suptitle()
    assert "memory, head only: ours 10%; ours, logits kept 30%; TRL 20%. whole step: ours 10%; TRL 20%\n" in title
    del found["TRL"]
    assert "memory, whole step: ours 10%\n" in grpo_memory_figure({"whole step": found}, "ours", "GPU").get_suptitle()


def test_liger_rows_at_the_reference_shape():
    assert liger_rows(REFERENCE) == 512 and liger_rows(TINY) <= TINY.rows


def test_plain_losses_leave_ignored_rows_out():
    import torch

    logits, labels = torch.randn(4, 9, dtype=torch.float64), torch.tensor([1, -100, 3, 8])
    kept = labels != -100
    for loss in (plain_losses.z_loss, plain_losses.focal):
        assert loss(logits, labels) == pytest.approx(loss(logits[kept], labels[kept]).item())
    assert plain_losses.distillation(logits, labels, logits).item() == pytest.approx(0)
    assert plain_losses.log_probs(logits, labels)[1] == plain_losses.entropies(logits, labels)[1] == 0
