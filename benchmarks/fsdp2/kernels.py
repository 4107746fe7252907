"""The same steps of QLoRA with challenge A's kernel and with bitsandbytes' de-quantisation, in turn, on one GPU.

    python -m benchmarks.fsdp2.kernels OUT SETTINGS.json

SETTINGS.json holds keyword arguments of `measure`. One process and one model take both kinds of steps, a pair at a
time and in changing order, so that a host or a clock that drifts reaches both.
"""

import contextlib
import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.fsdp2 import ranks
from benchmarks.fsdp2.steps import qlora_model
from benchmarks.fsdp2.training import Run
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.nf4.patch import patch_linear4bit

OURS, THEIRS = "ours", "bitsandbytes"


def measure(
    *,
    rows: int,
    length: int,
    shapes: str = "Llama 3.1 8B",
    layers: int = 2,
    vocabulary: int = 32000,
    dtype: str = "bfloat16",
    pairs: int = 16,
    profiles: int = 3,
) -> dict:
    """Train `pairs` pairs of steps, uncompiled and with activation checkpointing.

    Args:
        rows: Of a step.
        length: Tokens of a row.
        shapes: A key of `steps.SHAPES`.
        layers: Of the model.
        vocabulary: Of the model.
        dtype: That everything but the adapters computes in.
        pairs: Timed, after two that are not.
        profiles: Steps of each kind under PyTorch's profiler.

    Returns:
        The settings; "step_ms", the wall times by kind; "gpu_ms" by kind, what the GPU worked in a step, the median of
        `profiles`; on a CPU that is None.
    """
    settings = dict(locals())
    kind = getattr(torch, dtype)
    model = qlora_model(shapes, layers, vocabulary, kind, checkpointing=True)
    run = Run(model, rows, [length], vocabulary, 1, kind, seed=5)

    def step(kernels: str, what):
        with patch_linear4bit(model) if kernels == OURS else contextlib.nullcontext():
            return what()

    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for pair in range(2 + pairs):
        for kernels in (OURS, THEIRS) if pair % 2 else (THEIRS, OURS):
            (ms,) = step(kernels, lambda: run.train(1))["step_ms"]
            if pair >= 2:
                times[kernels].append(ms)
    busy = {kernels: [step(kernels, lambda: _gpu_ms(run)) for _ in range(profiles)] for kernels in times}
    gpu = {kernels: None if None in found else statistics.median(found) for kernels, found in busy.items()}
    return {**settings, "step_ms": times, "gpu_ms": gpu}


def _gpu_ms(run: Run) -> float | None:
    timeline = run.profile().get("timeline")
    return None if timeline is None else sum(elapsed for _, _, elapsed in timeline) / 1e3


def main(out: str, settings: str) -> None:
    ranks.start()
    found = measure(**json.loads(Path(settings).read_text()))
    write_json(out, found)
    for kernels, times in found["step_ms"].items():
        work = found["gpu_ms"][kernels]
        of_gpu = "" if work is None else f", the GPU's work {work:.2f} ms"
        print(f"{kernels}: {statistics.median(times):.1f} ms a step{of_gpu}")


if __name__ == "__main__":
    main(*sys.argv[1:])
