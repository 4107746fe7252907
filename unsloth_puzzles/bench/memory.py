"""Peak memory and allocator requests of one call."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

_highest = 0  # the peak before the statistics were last reset, so that measuring a call does not hide a section's peak


def peak_memory(function: Callable[[], Result]) -> tuple[Result, int]:
    """Call `function` and measure by how much memory in use rose above the state before, at most.

    Args:
        function: Is called once.

    Returns:
        The function's result, and bytes: on a GPU by the allocator's statistics of the current device, else by the
        CPU allocations that the profiler saw.
    """
    gc.collect()
    if not torch.cuda.is_available():
        return _cpu_peak(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    reset_peak()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def allocations(function: Callable[[], object]) -> int:
    """How many times `function` asks PyTorch's CUDA allocator for memory, what it caches and reuses included.

    Raises:
        RuntimeError: There is no GPU. The CPU's allocator counts every Python number that meets a tensor.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("allocations must be counted on a CUDA device, got none: only its allocator counts requests")
    before = _requests()
    function()
    return _requests() - before


def highest_since_restart() -> int | None:
    """Peak bytes that this process used on the current GPU since `restart_highest`, across `reset_peak`.

    None without a GPU.
    """
    return max(_highest, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def reset_peak() -> None:
    """Reset the peak statistics of the current GPU, as `torch.cuda.reset_peak_memory_stats`, and remember the peak.

    Code that measures by itself resets through this function, so that a section's peak stays known.
    """
    global _highest
    _highest = max(_highest, torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def restart_highest() -> None:
    """Forget the peak so far."""
    global _highest
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _highest = 0


def _requests() -> int:
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


def _cpu_peak(function: Callable[[], Result]) -> tuple[Result, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return result, peak
