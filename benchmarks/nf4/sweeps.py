"""The 4-bit layer, NVIDIA's sanitizer and the real Unsloth: too long for a notebook, so kept as a file of their own.

python -m benchmarks.nf4.sweeps resources/measurements/a_nf4_sweeps.json
"""

import os

from benchmarks.command import run_sweep
from benchmarks.nf4 import decoding
from benchmarks.nf4.harness import spread
from benchmarks.nf4.sanitize import sanitizer_errors
from benchmarks.nf4.unsloth_peer import measure_unsloth
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

MATRICES = [(1024, 4096, "float16"), (2048, 8192, "float16"), (4096, 14336, "float16"), (4096, 14336, "bfloat16")]
SQUARES = [(2**n, 2**n, "float16") for n in range(10, 16)]  # 1 M to 1 G weights
BYTES_PER_WEIGHT = 40  # that the buffers of a shape need at most, rotating ones included
ROUNDS = 1000


def measure(path: str | os.PathLike, hardware: Hardware, *, quick: bool = False) -> Measurements:
    """Measure the layer's times and rates, run the sanitizer, then time ours beside the real Unsloth.

    The file is saved after each of them.

    Args:
        path: The JSON file to write.
        hardware: What `probe()` returned.
        quick: Take fewer row counts and samples.

    Returns:
        The records of `decoding.measure`, "sanitizer_errors" by tool where compute-sanitizer is installed, and those of
        `add_unsloth` where Unsloth is.
    """
    found = Measurements(path, hardware)
    for record in decoding.measure(hardware, quick):
        found.add(**record)
    found.save()
    errors = sanitizer_errors() if hardware.device == "cuda" else "compute-sanitizer needs a GPU"
    if isinstance(errors, str):
        print("SKIPPED:", errors)
    else:
        for tool, count in errors.items():
            found.add("sanitizer_errors", tool, count, "errors")
        found.save()
    fitting = 0.7 * hardware.memory_gib * 2**30 / BYTES_PER_WEIGHT
    shapes = [shape for shape in MATRICES + SQUARES if shape[0] * shape[1] < fitting]
    peer = measure_unsloth(shapes, ROUNDS) if hardware.device == "cuda" else "Unsloth's kernels need a GPU"
    if isinstance(peer, str):
        print("SKIPPED:", peer)
    else:
        add_unsloth(found, peer)
        found.save()
    return found


def add_unsloth(found: Measurements, peer: dict) -> None:
    """Add what `measure_unsloth` returned; ours is the value of each record, Unsloth's times are its baselines."""
    name = f"Unsloth {peer['version']}"
    for case, times in peer["device_us"].items():
        theirs = {_named(key, name): us[0] for key, us in times.items() if key != "ours"}
        found.add("device_us_beside_unsloth", case, times["ours"][0], "us", *times["ours"][1:], theirs)
    for case, times in peer["enqueue_us"].items():
        theirs = {_named(key, name): us[0] for key, us in times.items() if key != "ours"}
        found.add("host_enqueue_us_beside_unsloth", case, times["ours"][0], "us", *times["ours"][1:], theirs)
    ours = peer["harness_s"]["ours"]
    for key, totals in peer["harness_s"].items():
        if key != "ours":
            ratio = spread([theirs / mine for mine, theirs in zip(ours, totals, strict=True)])
            found.add("harness_speedup_beside_unsloth", f"all, against {_named(key, name)}", ratio[0], "x", *ratio[1:])


def _named(key: str, name: str) -> str:
    return key.replace("unsloth", name)


if __name__ == "__main__":
    run_sweep(measure, "The 4-bit linear layer, and ours beside the real Unsloth.")
