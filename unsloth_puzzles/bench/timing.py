"""Timings that can be compared: candidates interleaved in one run, medians with spread, microseconds per call.

Three questions: how long does the device work (`device_time` of CUDA graphs, `event_time` of eager calls), how long
does the caller wait (`wall_time`), how long does the host need to hand a call to the device (`enqueue_time`).
"""

import gc
import math
import random
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils import benchmark

from unsloth_puzzles.bench.samplers import Call, captured, device_sampler, in_turn

MAX_QUEUED_CALLS = 100  # the launch queue holds about 1024 kernels: 100 calls of up to nine launches never fill it
_LEAD_CALLS = 10  # after a wait the host's first calls are slow (caches, clocks); a caller in a loop never sees that


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


def device_time(candidates: Mapping[str, Sequence[Call]], *, rounds: int = 30) -> dict[str, Timing]:
    """Time on the device: each candidate's closures become one CUDA graph, and the graphs are replayed in turn.

    A sample is two replays in a row, of which the second is timed. Without a GPU the closures are timed by the clock.

    Args:
        candidates: By name a list of closures, the same call over different buffers. Over `rotations(...)` sets of
            buffers no call finds its data in the L2 cache.
        rounds: Samples of each candidate. Every round replays every candidate once, in shuffled order.

    Returns:
        Microseconds per call, by name.

    Raises:
        TypeError: A candidate is no list, or an empty one.
        ValueError: There is no candidate, or `rounds` is below 1.
    """
    on_gpu = torch.cuda.is_available()
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    samplers: dict[str, Callable[[], float]] = {}
    for name, closures in candidates.items():
        if callable(closures) or not closures:
            raise TypeError(f"candidates[{name!r}] must be a list of functions that is not empty, got {closures!r}")
        batch, size = captured(closures, pool) if on_gpu else (in_turn(closures), len(closures))
        samplers[name] = device_sampler(batch, size) if on_gpu else _clock_sampler(batch, 1, size)
    return _interleaved(samplers, rounds)


def event_time(candidates: Mapping[str, Call], *, rounds: int = 20, calls: int = 1) -> dict[str, Timing]:
    """Time on the device of eager calls between two events: for what does not belong into a CUDA graph.

    A sample is two batches in a row, of which the second is timed. While the first is at work the host enqueues the
    second, as in a training loop.

    Args:
        candidates: A function by name.
        rounds: Samples of each candidate.
        calls: Calls in a batch, at most 100.

    Returns:
        Microseconds per call, by name.

    Raises:
        ValueError: There is no candidate, `rounds` is below 1, or `calls` is not in 1 to 100.
    """
    _check_queue(calls)
    samplers = {name: device_sampler(in_turn([call] * calls), calls) for name, call in candidates.items()}
    return _interleaved(samplers, rounds)


def wall_time(candidates: Mapping[str, Call], *, rounds: int = 30, calls: int = 1) -> dict[str, Timing]:
    """Time by the clock of `torch.utils.benchmark`, which waits for the device before it is read.

    Args:
        candidates: A function by name.
        rounds: Samples of each candidate.
        calls: Calls in a sample, after which the device is waited for once.

    Returns:
        Microseconds per call, by name.

    Raises:
        ValueError: There is no candidate, or `rounds` or `calls` is below 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    samplers = {name: _clock_sampler(call, calls, calls, benchmark.timer) for name, call in candidates.items()}
    return _interleaved(samplers, rounds)


def enqueue_time(candidates: Mapping[str, Call], *, rounds: int = 50, calls: int = 100) -> dict[str, Timing]:
    """Host cost of a call: the device is drained before each sample and not waited for after it.

    Ten calls lead each sample, untimed, since the first ones after a wait are slow. The 0.03 us of the loop itself are
    included.

    Args:
        candidates: A function by name.
        rounds: Samples of each candidate.
        calls: Calls in a sample, at most 100: were the launch queue to fill up, the device's time would be measured.

    Returns:
        Microseconds per call, by name.

    Raises:
        ValueError: There is no candidate, `rounds` is below 1, or `calls` is not in 1 to 100.
    """
    _check_queue(calls)
    samplers = {name: _clock_sampler(call, calls, calls, lead=_LEAD_CALLS) for name, call in candidates.items()}
    return _interleaved(samplers, rounds)


def rotations(bytes_per_set: int, l2_bytes: int | None) -> int:
    """How many sets of buffers make four times the L2 cache.

    Args:
        bytes_per_set: Bytes read and written of one set.
        l2_bytes: Size of the L2 cache. None without a GPU, where one set is enough.

    Raises:
        ValueError: `bytes_per_set` is not positive.
    """
    if bytes_per_set <= 0:
        raise ValueError(f"bytes_per_set must be positive, got {bytes_per_set}")
    return max(1, math.ceil(4 * (l2_bytes or 0) / bytes_per_set))


def _interleaved(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """One sample of each per round, in an order shuffled anew: drift and clock changes hit all candidates alike."""
    if not samplers:
        raise ValueError("candidates must be at least one, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
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


def _clock_sampler(
    call: Call, repeat: int, calls: int, clock: Callable[[], float] | None = None, lead: int = 0
) -> Callable[[], float]:
    """Waits for the device, makes `lead` calls, and times `repeat` of `call`, which stand for `calls` calls."""

    def set_up() -> None:
        _wait()
        for _ in range(lead):
            call()

    timer = timeit.Timer(call, set_up, clock or timeit.default_timer)
    return lambda: timer.timeit(repeat) * 1e6 / calls


def _check_queue(calls: int) -> None:
    if not 1 <= calls <= MAX_QUEUED_CALLS:
        raise ValueError(f"calls must be 1 to {MAX_QUEUED_CALLS}, or the launch queue could fill up, got {calls}")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
