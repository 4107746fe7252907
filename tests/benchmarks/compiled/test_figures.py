"""Tables and figures of QLoRA steps say what the runs hold."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.compiled.figures import busy_ms, memory_figure, parity_figure, products_table, recovery, steps_table
from benchmarks.compiled.parts import OPERATORS, find_parts, limits_in_words, parts_table
from benchmarks.compiled.steps import PARTS
from unsloth_puzzles.bench.compilations import Capture


def step_run(candidate, ms, gib, busy=None, **more):
    kernels = {"attention": {"ms": busy, "launches": 3}, "copies to and from the host": {"ms": 5.0, "launches": 1}}
    return {
        "candidate": candidate, "checkpointing": False, "step_ms": [900.0, ms, ms, ms], "peak_gib": gib,
        "pinned_gib": 0.0, "kernels": kernels if busy else {}, "compilations": 4, "compile_seconds": 7.0,
        "batch": 2, "lengths": [64, 48, 32, 16], "dtype": "bfloat16", "losses": [3.0, 2.0, 1.5, 1.0],
        "step_peak_gib": [gib] * 4, **more,
    }  # fmt: skip


@pytest.fixture
def closed():
    yield
    plt.close("all")


def test_steps_table_has_both_times_and_failures():
    lines = steps_table({"eager": step_run("eager", 20.0, 4.0, 12.0)}, {"compiled": "out of memory"}).splitlines()
    assert lines[2].startswith("| eager | 20.0 (20.0 to 20.0) | 12.0 | 4.00 |")
    assert lines[3].startswith("| compiled | FAILED: out of memory |")
    assert {line.count("|") for line in lines} == {8}


def test_gpu_time_leaves_copies_out_and_is_unknown_without_profile():
    assert busy_ms(step_run("eager", 20.0, 4.0, 12.0)) == 12.0
    assert busy_ms(step_run("eager", 20.0, 4.0)) is None


def test_recovery_counts_gpu_time():
    eager, compiled = step_run("eager", 20.0, 4.0, 12.0), step_run("compiled", 10.0, 1.0, 8.0)
    compiled["step_ms"][:2] = [2000.0, 1000.0]
    cost = "the first two steps, which compile, take 2 s more than eager's"
    assert (
        recovery(compiled, eager) == f"{cost}; a later step saves 4.0 ms of GPU time: it is recovered after 520 steps"
    )
    assert recovery(eager, compiled).endswith("saves -4.0 ms of GPU time: it is not recovered")


def test_products_table_has_the_largest_gains_of_triton():
    def product(rows, ours, theirs, tile):
        return {"rows": rows, "inner": 8, "columns": 8, "winner_us": ours, "cublas_us": theirs, "tile": tile}

    products = [product(16, 5.0, 6.0, "a"), product(32, 5.0, 20.0, "b"), product(64, 5.0, 5.0, None)]
    lines = products_table(products, largest=1).splitlines()
    assert len(lines) == 3 and lines[2] == "| 32 x 8 x 8 | 5.0 | 20.0 | b |"


def test_memory_figure_says_the_ratios(closed):
    runs = {"eager, a": step_run("eager", 20.0, 4.0, 10.0), "compiled, a": step_run("compiled", 10.0, 1.0, 8.0)}
    runs["parts, a"] = step_run(PARTS, 15.0, 2.0, 9.0)
    (axes,) = memory_figure(runs, "GPU, date").axes
    assert axes.get_title().splitlines()[0] == (
        "Compiled, a: 25% of the memory, 50% of the step time, 80% of the GPU time of eager"
    )
    assert axes.get_title().endswith("GPU, date")
    assert [text.get_text() for text in axes.texts] == [
        "eager, a\n4 GiB, 20 ms", "compiled, a\n1 GiB, 10 ms", "parts, a\n2 GiB, 15 ms",
    ]  # fmt: skip


def test_parity_figure_says_the_differences(closed):
    runs = {"eager, flash": step_run("eager", 1.0, 2.0), "eager, math": step_run("eager", 1.0, 2.0)}
    runs["eager, math"]["losses"] = [3.0, 2.0, 1.5, 1.002]
    runs["compiled"] = step_run("compiled", 1.0, 1.0)
    runs["compiled"]["losses"] = [3.0, 2.001, 1.5, 1.0]
    figure = parity_figure(runs, "GPU, date")
    assert "at most 2.0e-03 nats" in figure.get_suptitle() and "differ by 2.0e-03" in figure.get_suptitle()


def test_parts_are_found_by_their_operators():
    names = {name for _, features in OPERATORS.values() for wanted in features.values() for name in wanted}
    layer = Capture("LlamaDecoderLayer", None, 1, 1, operators=dict.fromkeys(names, 2))
    norm, loss = (Capture(name, None, 1, operators=dict(layer.operators)) for name in ("norm", "run_0"))
    parts = find_parts([layer, norm, loss], on_gpu=True)
    assert parts.keys() == OPERATORS.keys() and all(all(part.checks.values()) for part in parts.values())
    assert parts["attention"].operators == {"flex_attention": 2, "flex_attention_backward": 2}
    assert parts["loss"].functions == ["loss"] and "exponential in loss" in parts["loss"].checks
    assert parts["layer norms"].compilations == 3 and parts["layer norms"].operators == {"aten.rsqrt": 4}
    assert parts_table(parts).count("\n") == 1 + len(parts)
    missing = find_parts([norm], on_gpu=False)
    assert not any(missing["MLP"].checks.values()) and missing["MLP"].compilations == 0


def test_limits_are_said_in_words():
    said = limits_in_words({"suppress_errors": False, "recompile_limit": 8, "accumulated_recompile_limit": 256})
    assert said == (
        "Dynamo raises errors of the compiler and may compile a function 8 times for one module and 256 times in all"
    )
