"""What a T4 would take, from what the GPU here took: seconds by class of kernel, scaled. A prediction, no measurement.

A kernel's time beyond a fixed two microseconds, its own latency, is scaled by the ratio of rates: of matrix products in
16 bits what the GPU here does over 25 TFLOP/s; in float32, which Triton's products in 16 bits become there, over 6
TFLOP/s; of everything else the copy bandwidth here over 270 GB/s. The host takes twice as long.

A host that launches kernels need not wait for them, so the prediction has two ends. In the longer time host and GPU
take turns. In the shorter one they work at once within each cell of the notebook.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

T4_FLOPS16, T4_FLOPS32, T4_BANDWIDTH = 25e12, 6e12, 270e9  # what T4s sustain
SMALL_TILES = 100e12  # FLOP/s: assumed of Triton's products in 16 bits on a large GPU, in the tiles made for a T4
LATENCY_US = 2.0
HOST = 2.0

COPIES, PRODUCTS16, PRODUCTS32, DOTS16, BYTES = "copies", "products in 16 bits", "float32", "Triton's products", "bytes"


def kind(name: str, dots: Mapping[str, str]) -> str:
    """The class of a kernel by its name.

    Args:
        name: As the profiler gives it.
        dots: "f16" or "f32" by name, of Triton's kernels that multiply matrices.
    """
    low = name.lower()
    if "memcpy htod" in low or "memcpy dtoh" in low:
        return COPIES
    if name in dots:
        return DOTS16 if dots[name] == "f16" else PRODUCTS32
    if any(sign in low for sign in ("flash", "fmha", "sdpa")):
        return PRODUCTS32 if "f32" in low else PRODUCTS16
    wide = any(sign in low for sign in ("sgemm", "f32f32", "tf32", "simt", "nvjet_sss", "gemmsn", "gemvx"))
    if any(sign in low for sign in ("gemm", "nvjet", "cutlass", "cublas", "xmma", "wgmma", "splitk")):
        return PRODUCTS32 if wide else PRODUCTS16
    return BYTES


def scales(copy_bandwidth: float, matmul_flops: Mapping[str, float]) -> dict[str, float]:
    """By how much longer each class takes on a T4.

    Args:
        copy_bandwidth: Of the GPU here, bytes/s.
        matmul_flops: Of the GPU here, FLOP/s by name of the dtype.
    """
    return {
        COPIES: 2.0,
        PRODUCTS16: matmul_flops["float16"] / T4_FLOPS16,
        PRODUCTS32: matmul_flops["float32"] / T4_FLOPS32,
        DOTS16: max(SMALL_TILES / T4_FLOPS32, copy_bandwidth / T4_BANDWIDTH),
        BYTES: copy_bandwidth / T4_BANDWIDTH,
    }


def predict(
    windows: Iterable[Mapping],
    wall_seconds: float,
    dots: Mapping[str, str],
    scale: Mapping[str, float],
    tracing: float = 0.0,
) -> dict[str, object]:
    """Seconds of a section on a T4, and what they are made of.

    Args:
        windows: {"window": its name, "notebook": whether the notebook's process made it, "kernels": {name: [count,
            microseconds]}, "hook_seconds", "wall_seconds" without them, "profiler_bytes" of RAM} of each window of the
            profiler: a cell of the notebook, or a whole process.
        wall_seconds: Of the section here.
        dots: As `kind` takes it.
        scale: What `scales` returned.
        tracing: Seconds that the profiler adds to a launch. They are subtracted for the notebook's own launches only,
            since other processes may run side by side.
    """
    here, there, launches, traced, hook, at_once = defaultdict(float), defaultdict(float), 0, 0, 0.0, 0.0
    held = 0  # bytes of RAM
    of_windows = defaultdict(float)
    for window in windows:
        hook += window["hook_seconds"]
        held = max(held, window["profiler_bytes"])
        count, own, scaled = 0, 0.0, 0.0  # of the window: launches, seconds here and there
        for name, (launched, microseconds) in window["kernels"].items():
            what = kind(name, dots)
            latency = min(microseconds, launched * LATENCY_US)
            seconds = (latency + (microseconds - latency) * scale[what]) / 1e6
            here[what] += microseconds / 1e6
            there[what] += seconds
            count, own, scaled = count + launched, own + microseconds / 1e6, scaled + seconds
        of_windows[window["window"].strip().partition("\n")[0]] += scaled
        launches += count
        if window["notebook"]:
            traced += count
            at_once += min(HOST * max(0.0, window["wall_seconds"] - own - count * tracing), scaled)
    host = max(0.0, wall_seconds - sum(here.values()) - hook - traced * tracing)
    longest = HOST * host + sum(there.values())
    return {
        "predicted_t4_seconds": longest,
        "predicted_t4_seconds_at_least": max(longest - at_once, HOST * host, sum(there.values())),
        "host_seconds_here": host,
        "hook_seconds": hook,
        "profiler_gb": held / 1e9,
        "tracing_seconds": traced * tracing,
        "gpu_seconds_here": dict(here),
        "gpu_seconds_t4": dict(there),
        "gpu_seconds_t4_of_windows": {
            name: round(seconds, 1) for name, seconds in sorted(of_windows.items(), key=lambda of: -of[1])[:12]
        },
        "launches": launches,
    }
