"""The same steps of QLoRA with challenge A's kernel and with bitsandbytes' de-quantisation, in turn, on one GPU.

    python -m benchmarks.fsdp2.kernels OUT SETTINGS.json

SETTINGS.json holds keyword arguments of `measure`. One process and one model take both kinds of steps, a pair at a
time and in changing order, so that a host or a clock that drifts reaches both. Profiled steps alternate, too.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
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
    profiles: int = 10,
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
        profiles: Pairs of steps under PyTorch's profiler.

    Returns:
        The settings; "step_ms", the wall times by kind; "gpu_ms" by kind, the GPU's work in each profiled step; on a
        CPU that is None.
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
    busy: dict[str, list[float | None]] = {OURS: [], THEIRS: []}
    for pair in range(profiles):
        for kernels in (OURS, THEIRS) if pair % 2 == 0 else (THEIRS, OURS):
            busy[kernels].append(step(kernels, lambda: _gpu_ms(run)))
    gpu = {kernels: None if None in found else found for kernels, found in busy.items()}
    return {**settings, "step_ms": times, "gpu_ms": gpu}


def ratios(times: dict[str, list[float]]) -> list[float]:
    """Bitsandbytes' time over ours, of each pair of "step_ms" or "gpu_ms"."""
    return [theirs / ours for ours, theirs in zip(times[OURS], times[THEIRS], strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the range without the outer tenths at either end."""
    ordered, outer = sorted(values), len(values) // 10
    return statistics.median(ordered), ordered[outer], ordered[-1 - outer]


def row(name: str, times: dict[str, list[float]]) -> tuple[str, str, str, str]:
    """A line of the table: name, our and bitsandbytes' times and their ratio, each as median and range."""
    timed = ("{:.2f} ms ({:.2f} to {:.2f})".format(*spread(times[kernels])) for kernels in (OURS, THEIRS))
    return name, *timed, "{:.3f} ({:.3f} to {:.3f})".format(*spread(ratios(times)))


def _gpu_ms(run: Run) -> float | None:
    timeline = run.profile().get("timeline")
    return None if timeline is None else sum(elapsed for _, _, elapsed in timeline) / 1e3


def main(out: str, settings: str) -> None:
    ranks.start()
    found = measure(**json.loads(Path(settings).read_text()))
    write_json(out, found)
    for kernels, times in found["step_ms"].items():
        work = found["gpu_ms"][kernels]
        of_gpu = "" if work is None else f", the GPU's work {statistics.median(work):.2f} ms"
        print(f"{kernels}: {statistics.median(times):.1f} ms a step{of_gpu}")


if __name__ == "__main__":
    main(*sys.argv[1:])
