"""Timings, on a clock that only the timed functions move: what counts, in which order, and how it is summed up."""

import gc
import itertools
from dataclasses import astuple

import pytest
import torch

from unsloth_puzzles.bench import timing
from unsloth_puzzles.bench.timing import Timing, device_time, enqueue_time, event_time, rotations, wall_time


class Clock:
    """A clock that only the timed functions move, in nanoseconds."""

    def __init__(self):
        self.now = 0

    def takes(self, nanoseconds, log=None, name=None):
        def call():
            self.now += next(nanoseconds) if hasattr(nanoseconds, "__next__") else nanoseconds
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module, name in ((timing.timeit, "default_timer"), (timing.benchmark, "timer")):
        monkeypatch.setattr(module, name, lambda: clock.now / 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return clock


def assert_timings(found, expected):
    """Equal but for the rounding of seconds in floating point."""
    assert found.keys() == expected.keys()
    for name, timing_ in expected.items():
        assert astuple(found[name]) == pytest.approx(astuple(timing_))


def test_times_are_microseconds_per_call(clock):
    fast, slow = clock.takes(3_000), clock.takes(5_000)
    for timings in (
        device_time({"fast": [fast] * 4, "slow": [slow]}, rounds=3),
        wall_time({"fast": fast, "slow": slow}, rounds=3, calls=7),
        enqueue_time({"fast": fast, "slow": slow}, rounds=3),
    ):
        assert_timings(timings, {"fast": Timing(3.0, 3.0, 3.0, 3), "slow": Timing(5.0, 5.0, 5.0, 3)})


def test_summary_has_median_and_percentiles_without_the_warm_up(clock):
    # The first sample is the warm-up and does not count.
    durations = itertools.chain([10**9], range(0, 101_000, 1_000))
    timings = wall_time({"one": clock.takes(durations)}, rounds=101)
    assert_timings(timings, {"one": Timing(50.0, 10.0, 90.0, 101)})


def test_one_round_has_no_spread(clock):
    assert_timings(wall_time({"one": clock.takes(2_000)}, rounds=1), {"one": Timing(2.0, 2.0, 2.0, 1)})


def test_rounds_interleave_candidates_in_shuffled_order(clock):
    log = []
    device_time({name: [clock.takes(1, log, name)] for name in "abc"}, rounds=20)
    rounds = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert all(sorted(found) == ["a", "b", "c"] for found in rounds)
    assert len(rounds) == 21 and len(set(rounds)) > 1


def test_wall_time_includes_the_wait_for_the_device_and_enqueue_time_does_not(clock, monkeypatch):
    wait = clock.takes(1_000_000)

    def waiting_timer():
        wait()
        return clock.now / 1e9

    monkeypatch.setattr(timing, "_wait", wait)
    monkeypatch.setattr(timing.benchmark, "timer", waiting_timer)
    call = {"one": clock.takes(2_000)}
    assert enqueue_time(call, rounds=2, calls=10)["one"].median == pytest.approx(2.0)
    assert wall_time(call, rounds=2, calls=10)["one"].median == pytest.approx(2.0 + 1000 / 10)


@pytest.mark.gpu
def test_wall_time_waits_for_the_device():
    """A product that takes milliseconds is enqueued in microseconds."""
    a = torch.randn(4096, 4096, device="cuda")
    call = {"product": lambda: a @ a}
    timings = wall_time(call, rounds=5)["product"], event_time(call, rounds=5)["product"]
    assert timings[0].median > 0.8 * timings[1].median > enqueue_time(call, rounds=5, calls=1)["product"].median


def test_enqueue_time_drains_the_device_before_each_sample(clock, monkeypatch):
    log = []
    monkeypatch.setattr(timing, "_wait", lambda: log.append("wait"))
    enqueue_time({"one": clock.takes(1, log, "call")}, rounds=2, calls=2)
    assert log == ["wait", *["call"] * (timing._LEAD_CALLS + 2)] * 3


def test_event_time_times_the_second_of_two_batches(clock, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, stop):
            return (stop.at - self.at) / 1e6

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    durations = itertools.cycle([50_000, 50_000, 3_000, 3_000])  # a batch is two calls, the first of each pair slow
    timings = event_time({"one": clock.takes(durations, log, "call")}, rounds=2, calls=2)
    assert timings == {"one": Timing(3.0, 3.0, 3.0, 2)}
    assert log == ["sleep", "call", "call", "record", "call", "call", "record", "wait"] * 3


@pytest.mark.parametrize("calls", [0, 101])
def test_calls_that_could_fill_the_launch_queue_are_refused(clock, calls):
    with pytest.raises(ValueError, match=f"calls must be 1 to 100.* got {calls}"):
        enqueue_time({"one": clock.takes(1)}, calls=calls)
    with pytest.raises(ValueError, match=f"calls must be 1 to 100.* got {calls}"):
        event_time({"one": clock.takes(1)}, calls=calls)


def test_bad_arguments_are_refused(clock):
    with pytest.raises(TypeError, match=r"candidates\['one'\] must be a list of functions"):
        device_time({"one": clock.takes(1)})
    with pytest.raises(TypeError, match=r"candidates\['none'\]"):
        device_time({"none": []})
    with pytest.raises(ValueError, match="candidates must be at least one, got none"):
        wall_time({})
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        wall_time({"one": clock.takes(1)}, rounds=0)
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        wall_time({"one": clock.takes(1)}, calls=0)


def test_garbage_collector_is_off_during_samples_and_on_afterwards(clock):
    collecting = []

    def fails_at_last():
        collecting.append(gc.isenabled())
        if len(collecting) == 3:
            raise KeyError("third call")

    assert gc.isenabled()
    with pytest.raises(KeyError, match="third call"):
        wall_time({"one": fails_at_last}, rounds=5)
    assert collecting[1:] == [False, False] and gc.isenabled()


def test_rotations_cover_four_times_the_l2():
    l2_bytes = 4_000_000
    assert [rotations(size, l2_bytes) for size in (1_000_000, 5_999_999, 15_999_999, 16_000_000)] == [16, 3, 2, 1]
    assert rotations(1, None) == 1  # a CPU
    with pytest.raises(ValueError, match="bytes_per_set must be positive, got 0"):
        rotations(0, l2_bytes)


def test_per_second_is_a_rate():
    assert Timing(median=2.0, low=1.0, high=3.0, samples=5).per_second(6) == pytest.approx(3e6)


@pytest.mark.gpu
def test_device_time_replays_every_closure_equally_often():
    counters = [torch.zeros(1, device="cuda") for _ in range(3)]
    timings = device_time({"add": [lambda c=c: c.add_(1) for c in counters]}, rounds=5)
    counts = {int(counter) for counter in counters}
    assert timings["add"].samples == 5 and timings["add"].median > 0
    # Two eager passes, then replays of a graph of some passes: the warm-up's and five rounds.
    (count,) = counts
    assert count > 2 and (count - 2) % 6 == 0
