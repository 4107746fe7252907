"""What a step takes: points in time on the GPU's clock, kernels by kind, and pinned memory."""

import time
from collections.abc import Callable

import torch

from benchmarks.gpu_work import gpu_work

KINDS = {  # of what runs on a GPU, by what its name contains; the first that fits
    "copies to and from the host": ("memcpy htod", "memcpy dtoh"),
    "attention": ("flash", "fmha", "sdpa", "flex"),
    "Triton's products": ("triton_tem",),  # made from Inductor's templates
    "cuBLAS's products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "de-quantisation": ("dequant",),
    "all else": ("",),
}


def now(device: str) -> float | torch.cuda.Event:
    """A point in time; on a GPU, when it has done what it has been given until now."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end) -> float:
    if isinstance(end, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def kernels_of(step: Callable) -> dict[str, dict]:
    """{kind: {"ms", "launches"}} of one step, by the profiler."""
    found = {kind: {"ms": 0.0, "launches": 0} for kind in KINDS}
    for work in gpu_work(step):
        kind = next(kind for kind, signs in KINDS.items() if any(sign in work.name.lower() for sign in signs))
        found[kind]["ms"] += work.length / 1e3
        found[kind]["launches"] += 1
    return found


def free_pinned() -> None:
    """Give back the pinned memory that is kept for reuse."""
    torch.cuda.synchronize()
    torch._C._host_emptyCache()


def pinned_gib() -> float | None:
    """Return the pinned memory of the host, in use or kept for reuse; None if this PyTorch does not tell."""
    found = getattr(torch.cuda, "host_memory_stats", dict)().get("allocated_bytes.current")
    return None if found is None else found / 2**30
