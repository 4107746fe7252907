"""The same steps of QLoRA with challenge A's kernel and with bitsandbytes' de-quantisation, in turn, on one GPU.

    python -m benchmarks.fsdp2.kernels OUT SETTINGS.json

SETTINGS.json holds keyword arguments of `measure`. One process and one model take all kinds of steps, a round at a
time and in changing order, so that a host or a clock that drifts reaches all. A kind's first step after the exchange of
the layers is not timed. Profiled steps take turns, too.
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
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.nf4.patch import patch_linear4bit

OURS, PACKED, THEIRS = "ours", "ours, packed", "bitsandbytes"
KINDS = (OURS, THEIRS, PACKED)  # `patch_linear4bit`; bitsandbytes' own layers; the script's layers, of one rank


def measure(
    *,
    rows: int,
    length: int,
    shapes: str = "Llama 3.1 8B",
    layers: int = 2,
    vocabulary: int = 32000,
    dtype: str = "bfloat16",
    rounds: int = 16,
    profiles: int = 10,
) -> dict:
    """Train `rounds` steps of each kind, uncompiled and with activation checkpointing.

    Args:
        rows: Of a step.
        length: Tokens of a row.
        shapes: A key of `shapes.SHAPES`.
        layers: Of the model.
        vocabulary: Of the model.
        dtype: That everything but the adapters computes in.
        rounds: Timed, after two that are not.
        profiles: Rounds of steps under PyTorch's profiler.

    Returns:
        The settings; "step_ms", the wall times by kind; "gpu_ms" by kind, the GPU's work in each profiled step; on a
        CPU that is None.
    """
    settings = dict(locals())
    compute = getattr(torch, dtype)
    model = qlora_model(shapes, layers, vocabulary, compute, checkpointing=True)
    run = Run(model, rows, [length], vocabulary, 1, compute, seed=5)

    def step(kind: str, what):
        with contextlib.ExitStack() as stack:
            if kind == OURS:
                stack.enter_context(patch_linear4bit(model))
            elif kind == PACKED:
                stack.callback(pack_nf4(model, world_size=1).undo)
            return what()

    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(2 + rounds):
        for kind in _order(number):
            _, ms = step(kind, lambda: run.train(2))["step_ms"]  # the first finds layers that were just exchanged
            if number >= 2:
                times[kind].append(ms)
    busy: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
    for number in range(profiles):
        for kind in _order(number):
            busy[kind].append(step(kind, lambda: _gpu_ms(run)))
    gpu = {kind: None if None in found else found for kind, found in busy.items()}
    return {**settings, "step_ms": times, "gpu_ms": gpu}


def _order(number: int) -> tuple[str, ...]:
    """The kinds of steps, each of them first, second and last equally often."""
    first = number % len(KINDS)
    return KINDS[first:] + KINDS[:first]


def ratios(times: dict[str, list[float]], kind: str = OURS) -> list[float]:
    """Bitsandbytes' time over that of a kind of ours, of each round of "step_ms" or "gpu_ms"."""
    return [theirs / ours for ours, theirs in zip(times[kind], times[THEIRS], strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the range without the outer tenths at either end."""
    ordered, outer = sorted(values), len(values) // 10
    return statistics.median(ordered), ordered[outer], ordered[-1 - outer]


def row(name: str, times: dict[str, list[float]], kind: str = OURS) -> tuple[str, str, str, str]:
    """A line of the table: name, our and bitsandbytes' times and their ratio, each as median and range."""
    timed = ("{:.2f} ms ({:.2f} to {:.2f})".format(*spread(times[one])) for one in (kind, THEIRS))
    return name, *timed, "{:.3f} ({:.3f} to {:.3f})".format(*spread(ratios(times, kind)))


def _gpu_ms(run: Run) -> float | None:
    timeline = run.profile().get("timeline")
    return None if timeline is None else sum(elapsed for _, _, elapsed in timeline) / 1e3


def main(out: str, settings: str) -> None:
    ranks.start()
    found = measure(**json.loads(Path(settings).read_text()))
    write_json(out, found)
    for kind, times in found["step_ms"].items():
        work = found["gpu_ms"][kind]
        of_gpu = "" if work is None else f", the GPU's work {statistics.median(work):.2f} ms"
        print(f"{kind}: {statistics.median(times):.1f} ms a step{of_gpu}")


if __name__ == "__main__":
    main(*sys.argv[1:])
