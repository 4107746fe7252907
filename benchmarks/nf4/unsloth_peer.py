"""The real Unsloth on the same GPU, in a process of its own: importing it patches torch, transformers and bitsandbytes.

    python -m benchmarks.nf4.unsloth_peer

prints one JSON line. Unsloth may live in a folder of its own, with the versions of its dependencies that it needs; the
variable UNSLOTH_PUZZLES_PEERS names it.
"""

import importlib.util
import json
import os
import sys
from functools import partial

from unsloth_puzzles.bench import child

PEERS = "UNSLOTH_PUZZLES_PEERS"
SECONDS = 600


def measure_unsloth(shapes: list[tuple[int, int, str]], rounds: int) -> dict | str:
    """Times of Unsloth's `fast_dequantize` beside ours in the same process, or the reason why there are none.

    `shapes` are (rows, columns, dtype name). Keys of the result: "version", "fused" (whether this Unsloth has a kernel
    of its own), "device_us" and "enqueue_us" {shape: {name: [median, low, high]}}, "harness_s" {name: [totals]}.
    """
    if not (os.environ.get(PEERS) or importlib.util.find_spec("unsloth")):
        return "unsloth is not installed here"
    settings = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # Unsloth would choose expandable segments, in which every kernel here, ours too, is 2 to 4 % slower,
        # inferred from two processes.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": os.path.join(os.getcwd(), "unsloth_compiled_cache"),
    }
    environment = child.environment(*filter(None, [os.environ.get(PEERS)]), **settings)
    asked = json.dumps([shapes, rounds])
    try:
        lines = child.run("benchmarks.nf4.unsloth_peer", asked, timeout=SECONDS, env=environment, show=None)
    except child.ChildError as error:
        return f"unsloth failed: {error}"
    found = [line for line in lines if line.startswith("{")]
    return json.loads(found[-1]) if found else "unsloth failed: it printed no result"


def main(shapes, rounds: int) -> None:
    """Measure here, where Unsloth may be imported."""
    import unsloth  # first, as it asks: it patches what the others import
    import unsloth.kernels.utils as kernels

    import torch  # isort: skip
    from benchmarks.nf4 import harness
    from benchmarks.nf4.baselines import bitsandbytes_dequantize
    from benchmarks.nf4.workload import bytes_per_weight, calls, make_layer
    from unsloth_puzzles.bench import timing
    from unsloth_puzzles.bench.hardware import probe
    from unsloth_puzzles.nf4 import dequantize_nf4

    candidates = {
        "ours": dequantize_nf4,
        "unsloth": lambda layer: kernels.fast_dequantize(layer.weight.data, layer.weight.quant_state),
    }
    three = getattr(kernels, "_fast_dequantize_ctypes", None)  # its path before it had a kernel of its own
    if three is not None:
        candidates["unsloth, three launches"] = lambda layer: three(layer.weight.data, layer.weight.quant_state)
    hardware = probe(measure=False)
    found = {"version": unsloth.__version__, "device_us": {}, "enqueue_us": {}}
    for rows, columns, dtype in shapes:
        weights = rows * columns
        sets = timing.rotations(bytes_per_weight(getattr(torch, dtype)) * weights, hardware.l2_bytes)
        layers = [make_layer(rows, columns, getattr(torch, dtype), "cuda") for _ in range(sets)]
        timings = timing.device_time({name: calls(f, layers) for name, f in candidates.items()})
        found["device_us"][f"{rows}x{columns} {dtype}"] = _rows(timings)
        if weights <= 2**22:
            enqueued = timing.enqueue_time({name: partial(f, layers[0]) for name, f in candidates.items()})
            found["enqueue_us"][f"{rows}x{columns} {dtype}"] = _rows(enqueued)
        del layers
        torch.cuda.empty_cache()
    seconds = harness.measure(candidates, bitsandbytes_dequantize, rounds=rounds)
    found["harness_s"] = {
        name: [sum(times) for times in zip(*by_case.values(), strict=True)] for name, by_case in seconds.items()
    }
    found["fused"] = bool(getattr(kernels, "_USE_NF4_KERNELS", False))  # read last: a failed compile turns it off
    print("\n" + json.dumps(found), flush=True)


def _rows(timings) -> dict[str, list[float]]:
    return {name: [found.median, found.low, found.high] for name, found in timings.items()}


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
