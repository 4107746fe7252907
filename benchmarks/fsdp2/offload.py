"""Memory of the whole Llama 3.1 8B with CPU offload, on two ranks that share one GPU.

    python -m benchmarks.fsdp2.offload resources/measurements/b_fsdp2_offload.json

The ranks exchange data by gloo through the CPU, so a step takes seconds and says nothing of the speed on two GPUs. The
memory is taken to be that of a rank with a GPU of its own: without offload, the peaks by gloo and by NCCL were equal.
"""

import os

from benchmarks.command import run_sweep
from benchmarks.fsdp2.sweeps import WHOLE, add_memory, run_cases
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

CASE = {**WHOLE, "steps": 3, "offload": True}
NAME = "whole model, CPU offload, two ranks on one GPU"


def measure(path: str | os.PathLike, hardware: Hardware | None = None, timeout: float = 600) -> Measurements:
    """Train three steps, and save what they took.

    Args:
        path: The file.
        hardware: As `Measurements` takes it.
        timeout: Seconds.

    Returns:
        Metrics of a rank: "peak_gib" and "rest_gib" (between steps) that PyTorch allocates on the GPU, and "share" of
        the 4-bit bytes and scales.

    Raises:
        RuntimeError: The memory was not measured, or does not suffice.
    """
    found = Measurements(path, hardware)
    ((run,), _) = run_cases([CASE], 2, timeout, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    if "error" in run:
        raise RuntimeError(f"{NAME}: {run['error']}")
    add_memory(found, NAME, run)
    if not any(record["metric"] == "peak_gib" for record in found.records):
        raise RuntimeError(f"{NAME}: no memory was measured")
    found.save()
    return found


if __name__ == "__main__":
    run_sweep(measure, "Memory of Llama 3.1 8B's shapes with CPU offload.")
