"""The benchmark runs here, at a size of seconds, and its figures are those of what it says it measures."""

import pytest
import torch

from benchmarks.backprop import linear_losses
from benchmarks.backprop.baselines import COMPILED, EAGER, FLOOR, FLOOR_FLOAT32
from benchmarks.backprop.linear_losses import (
    OURS,
    OURS_FLOAT32,
    Measured,
    Results,
    auto_rows,
    candidates,
    frontier,
    losses,
    measure,
    of_labelled_rows,
    ours,
    vocabulary_sweep,
)
from benchmarks.backprop.workload import TINY, Shape, make_case
from unsloth_puzzles.bench.timing import Timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="exact byte counts are the CPU's: a GPU's blocks are rounded up")


def test_candidates_of_a_trained_and_a_frozen_head():
    calls, left_out = candidates(make_case(TINY, "cpu"), compile=False)
    assert set(calls) == {OURS, OURS_FLOAT32, EAGER, COMPILED, FLOOR, FLOOR_FLOAT32}
    assert all("GPU" in reason for reason in left_out.values()) and len(left_out) == 3
    frozen, left_out = candidates(make_case(TINY, "cpu", train_head=False), compile=False, without=[COMPILED])
    assert set(frozen) == {OURS, EAGER, FLOOR}
    assert len(left_out) == 2  # there is no float32 dW to be left out


def test_a_floor_that_does_not_exist_is_left_out_with_the_reason():
    case = make_case(Shape(40, 16, 100, torch.bfloat16), "cpu")
    calls, left_out = candidates(case, compile=False)
    assert FLOOR in calls and FLOOR_FLOAT32 not in calls
    assert "sm_80" in left_out[FLOOR_FLOAT32]


@pytest.mark.parametrize("train_head", [True, False])
def test_every_loss_gives_one_value(train_head):
    case = make_case(TINY, "cpu", train_head=train_head, ignored=0.2)
    found, _ = losses(case, compile=False, without=[COMPILED])
    values = {name: loss(case.hidden_states, case.weight, case.labels).item() for name, loss in found.items()}
    assert len(values) == 2 + train_head
    assert list(values.values()) == pytest.approx([values[EAGER]] * len(values), rel=1e-6)


@on_cpu
@pytest.mark.parametrize("train_head", [True, False])
def test_peaks_and_times(train_head):
    case = make_case(TINY, "cpu", train_head=train_head)
    calls, _ = candidates(case, compile=False, without=[COMPILED])
    found = measure(calls, rounds=2)
    assert set(found.measured) == set(calls) and not found.failed
    peaks = {name: result.extra_peak_gib for name, result in found.measured.items()}
    assert peaks[FLOOR] == TINY.least_gib(auto_rows(case), train_head)  # the chunks of ours
    assert peaks[FLOOR] < peaks[OURS] < 0.5 * peaks[EAGER]
    logits = TINY.rows * TINY.vocabulary * 4 / 2**30
    assert peaks[EAGER] > 2 * logits  # they, and their gradient
    for result in found.measured.values():
        assert result.time.samples == 2 and result.time.median > 0


def test_candidates_out_of_memory_are_named_and_not_timed():
    calls = []

    def too_large():
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB. GPU 0 has 1.00 GiB free.")

    found = measure({"large": too_large, "small": lambda: torch.ones(8, device=DEVICE)}, rounds=1)
    assert set(found.measured) == {"small"} and len(calls) == 1
    assert found.failed == {"large": "out of memory: CUDA out of memory"}


def test_other_errors_are_not_swallowed():
    def broken():
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        measure({"broken": broken}, rounds=1)
    others = {"broken": broken, "small": lambda: torch.ones(8, device=DEVICE)}
    found = measure(others, rounds=1, may_fail=["broken"])
    assert found.failed == {"broken": "ValueError: wrong shape"} and set(found.measured) == {"small"}


def test_the_peak_is_that_of_a_second_call(monkeypatch):
    """The first compiles and fills caches, which are no part of the candidate."""
    calls, measured_at = [], []

    def peak(call):
        measured_at.append(len(calls))
        return call(), 2**30

    monkeypatch.setattr(linear_losses, "peak_memory", peak)
    found = measure({"one": lambda: calls.append(1)}, rounds=1)
    assert measured_at == [1] and found.measured["one"].extra_peak_gib == 1


def test_ratio_of_medians():
    timings = {name: Measured(1.0, Timing(us, us, us, 3)) for name, us in (("a", 30.0), ("b", 20.0))}
    assert Results(timings).time_over("a", "b") == 1.5


@on_cpu
def test_frontier():
    case = make_case(TINY, "cpu")
    sizes = (64, 250, 1000, 4096)
    eager = {EAGER: losses(case)[0][EAGER]}
    found = frontier(case, sizes, beside=eager, compile=False, rounds=1)
    assert list(found) == [64, 250, 1000]  # 4096 rows are no chunk of 1000
    for size, results in found.items():
        assert set(results.measured) == {OURS, FLOOR, EAGER}
        assert results.measured[FLOOR].extra_peak_gib == TINY.least_gib(size)
    peaks = [results.measured[OURS].extra_peak_gib for results in found.values()]
    assert peaks == sorted(peaks) and peaks[0] < 0.6 * peaks[-1]
    assert len({id(results.measured[EAGER]) for results in found.values()}) == 1  # one measurement, in this run


@on_cpu
def test_vocabulary_sweep():
    found = vocabulary_sweep(TINY, "cpu", (256, 2048), compile=False, without=[COMPILED, OURS_FLOAT32], rounds=1)
    assert list(found) == [256, 2048]
    peaks = {size: {name: m.extra_peak_gib for name, m in at.measured.items()} for size, at in found.items()}
    assert set(peaks[256]) == {OURS, EAGER, FLOOR, FLOOR_FLOAT32}
    assert peaks[2048][EAGER] > 7 * peaks[256][EAGER]
    assert peaks[2048][OURS] < 0.5 * peaks[2048][EAGER]


def test_chunk_size_and_dtype_of_the_sum_reach_the_op(monkeypatch):
    given = {}
    monkeypatch.setattr(linear_losses, "memory_efficient_linear", lambda *args, **options: given.update(options))
    case = make_case(TINY, "cpu")
    ours(77, accumulate_dtype=torch.float32)(case.hidden_states, case.weight, case.labels)
    assert given == {
        "reduction": "sum",
        "normalizer": "labels",
        "chunk_size": 77,
        "accumulate_dtype": torch.float32,
        "compile": True,
    }


@pytest.mark.gpu
def test_everything_runs_compiled_on_a_gpu():
    shape = Shape(1024, 256, 8192, torch.bfloat16)
    for train_head in (True, False):
        calls, left_out = candidates(make_case(shape, "cuda", train_head=train_head))
        found = measure(calls, rounds=1)
        assert set(found.measured) == set(calls) and not found.failed, left_out


def test_loss_of_labelled_rows_has_the_gradients_of_all_rows():
    case = make_case(TINY, "cpu", ignored=0.8)
    loss = ours(compile=False)
    every, chosen = case.forward_backward(loss), case.forward_backward(of_labelled_rows(loss))
    for one, other in zip(every, chosen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not chosen[1][case.labels == -100].any() and chosen[1].any()
