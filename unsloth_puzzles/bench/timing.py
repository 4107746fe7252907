"""Timings that can be compared: candidates interleaved in one run, medians with spread, microseconds per call.

Three questions, three functions: how long does the device work (`device_time`), how long does the caller wait
(`wall_time`), how long does the host need to hand a call to the device (`enqueue_time`).
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from unsloth_puzzles.bench import section

if TYPE_CHECKING:
    from unsloth_puzzles.bench.hardware import Hardware

Call = Callable[[], object]

MAX_QUEUED_CALLS = 100  # the launch queue holds about 1024 kernels: 100 calls of up to nine launches never fill it
_LEAD_CALLS = 10  # after a wait the host's first calls are slow (caches, clocks); a caller in a loop never sees that
_GRAPH_US = 1000.0  # a graph that lasts this long makes the 2 us of its launch 0.2 %
_MAX_PASSES = 100
_SLEEP_CYCLES = 500_000  # about 0.3 ms: the device is still busy when the work between two events has been enqueued


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile of `samples` samples."""

    median: float
    low: float
    high: float
    samples: int

    def per_second(self, amount: float) -> float:
        """Rate at which a call handles `amount` (bytes, FLOPs, tokens), per second."""
        return amount / (self.median * 1e-6)


def device_time(
    candidates: Mapping[str, Sequence[Call]], *, rounds: int = 30, bytes_per_call: float = 0, flops_per_call: float = 0
) -> dict[str, Timing]:
    """Time on the device: each candidate's closures become one CUDA graph, and the graphs are replayed in turn.

    A sample is two replays in a row, of which the second is timed.
    A candidate is a list of closures, the same call over different buffers: over `rotations(...)` sets no call finds
    its data in the L2 cache. Every round replays every candidate once, in shuffled order. Without a GPU the closures
    are timed by the clock. `bytes_per_call` and `flops_per_call` go to the open section's account.
    """
    on_gpu = torch.cuda.is_available()
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    samplers: dict[str, Callable[[], float]] = {}
    calls = 0
    for name, closures in candidates.items():
        if callable(closures) or not closures:
            raise TypeError(f"candidates[{name!r}]: got {closures!r}, need a non-empty list of functions")
        batch, size = _captured(closures, pool) if on_gpu else (_in_turn(closures), len(closures))
        samplers[name] = _device_sampler(batch, size) if on_gpu else _clock_sampler(batch, size)
        calls += size * (rounds + 1) * (1 + on_gpu)
    timings = _interleaved(samplers, rounds)
    section.work(calls * bytes_per_call, calls * flops_per_call)
    return timings


def event_time(candidates: Mapping[str, Call], *, rounds: int = 20, calls: int = 1) -> dict[str, Timing]:
    """Time on the device of `calls` eager calls between two events: for what does not belong into a CUDA graph.

    A sample is two batches in a row, of which the second is timed. While the first is at work the host enqueues the
    second, as in a training loop.
    """
    _check_queue(calls)
    samplers = {name: _device_sampler(_in_turn([call] * calls), calls) for name, call in candidates.items()}
    return _interleaved(samplers, rounds)


def wall_time(
    candidates: Mapping[str, Call],
    *,
    rounds: int = 30,
    calls: int = 1,
    synchronize: bool = True,
    bytes_per_call: float = 0,
    flops_per_call: float = 0,
) -> dict[str, Timing]:
    """Time by the clock: a sample is `calls` calls, then (with `synchronize`) one wait for the device, all timed."""
    if calls < 1:
        raise ValueError(f"calls: got {calls}, need at least 1")
    wait = _wait if synchronize else None
    samplers = {name: _clock_sampler(_in_turn([call] * calls), calls, wait) for name, call in candidates.items()}
    timings = _interleaved(samplers, rounds)
    total = calls * (rounds + 1) * len(candidates)
    section.work(total * bytes_per_call, total * flops_per_call)
    return timings


def enqueue_time(candidates: Mapping[str, Call], *, rounds: int = 50, calls: int = 100) -> dict[str, Timing]:
    """Host cost of a call: `calls` of them without waiting for the device, which is drained before each sample.

    Ten calls lead each sample, untimed: the first ones after a wait are slow.
    At most 100 calls a sample (ValueError): were the launch queue to fill up, the device's time would be measured.
    The 0.03 us of the loop itself are included.
    """
    _check_queue(calls)
    samplers = {
        name: _clock_sampler(_in_turn([call] * calls), calls, lead=_in_turn([call] * _LEAD_CALLS))
        for name, call in candidates.items()
    }
    return _interleaved(samplers, rounds)


def rotations(bytes_per_set: int, hardware: "Hardware") -> int:
    """How many sets of buffers, each of `bytes_per_set` read and written, make four times the L2 cache."""
    if bytes_per_set <= 0:
        raise ValueError(f"bytes_per_set: got {bytes_per_set}, need a positive number")
    return max(1, math.ceil(4 * (hardware.l2_bytes or 0) / bytes_per_set))


def _interleaved(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """One sample of each per round, in an order shuffled anew: drift and clock changes hit all candidates alike."""
    if not samplers:
        raise ValueError("candidates: got none, need at least one")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, need at least 1")
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    shuffle = random.Random(0).shuffle
    order = list(samplers)
    for name in order:
        samplers[name]()  # warm-up: compilation, caches, clocks
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return Timing(statistics.median(values), deciles[0], deciles[-1], len(values))


def _clock_sampler(batch: Call, size: int, wait: Call | None = None, lead: Call | None = None) -> Callable[[], float]:
    def sample() -> float:
        _wait()
        if lead:
            lead()
        start = time.perf_counter_ns()
        batch()
        if wait:
            wait()
        return (time.perf_counter_ns() - start) / 1e3 / size

    return sample


def _device_sampler(batch: Call, size: int) -> Callable[[], float]:
    """Times the second of two batches in a row, so that each candidate pays for itself.

    The first writes back what another candidate has left dirty in the L2 (up to 60 MB: 3 % of a sample of 1 ms), and
    brings the clocks to what this one's power draw allows: without it the same matrix products took 45 to 51 ms in one
    run (H200), probably by what power the candidate before them had drawn.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda._sleep(_SLEEP_CYCLES)  # else gaps between the first kernels are the host's launch cost
        batch()
        start.record()
        batch()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / size

    return sample


def _captured(closures: Sequence[Call], pool: object) -> tuple[Call, int]:
    """The closures, in turn, as a CUDA graph of about a millisecond: (replay it, calls in it).

    The graphs share a memory pool, so a replay may overwrite what an earlier one returned; nobody reads it.
    """
    batch = _in_turn(closures)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up belongs on the stream of the capture: workspaces are per stream
        batch()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        batch()
        stop.record()
    stream.synchronize()
    passes = min(_MAX_PASSES, math.ceil(_GRAPH_US / max(1.0, start.elapsed_time(stop) * 1e3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        for _ in range(passes):
            batch()
    torch.cuda.synchronize()
    return graph.replay, passes * len(closures)


def _in_turn(closures: Sequence[Call]) -> Call:
    def batch() -> None:
        for call in closures:
            call()

    return batch


def _check_queue(calls: int) -> None:
    if not 1 <= calls <= MAX_QUEUED_CALLS:
        raise ValueError(f"calls: got {calls}, need 1 to {MAX_QUEUED_CALLS}, or the launch queue could fill up")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
