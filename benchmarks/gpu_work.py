"""What a GPU did in one call: its kernels and copies, by PyTorch's profiler.

A profiler that is the first of its process misses the kernels of its first milliseconds. `gpu_work` therefore profiles
a marker kernel first and forgets that profile. In the profile that counts, a marker comes right before the call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MARKER = "spin_kernel"  # in the name of what `torch.cuda._sleep` launches


class Work(NamedTuple):
    """A kernel, a copy or a fill: its name, when it began and how long it took, in us."""

    name: str
    start: float
    length: float


def gpu_work(call: Callable[[], object], before: Callable[[], object] | None = None) -> list[Work]:
    """Profile one call on the current CUDA device.

    Args:
        call: Launches the work. It does not need to wait for it.
        before: Called when the profiler is at work, before `call`. Its work is not of the call. A barrier, for example:
            a profiler takes longer to start on one rank than on another.

    Returns:
        The work of `call`, in the order in which it began.

    Raises:
        RuntimeError: The profile lacks the marker.
    """
    _profiled(_mark)

    def all_of_it() -> None:
        if before:
            before()
        _mark()
        call()

    return after_marker(_profiled(all_of_it))


def after_marker(work: list[Work]) -> list[Work]:
    """The part of `work` that began after the marker had ended, in the order in which it began."""
    markers = [one for one in work if MARKER in one.name]
    if not markers:
        raise RuntimeError(f"the profile must hold the marker {MARKER!r}, got {len(work)} other kernels and copies")
    end = markers[0].start + markers[0].length
    return sorted((one for one in work if one.start >= end), key=lambda one: one.start)


def _mark() -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()  # so that no other stream begins earlier


def _profiled(call: Callable[[], object]) -> list[Work]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        Work(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
