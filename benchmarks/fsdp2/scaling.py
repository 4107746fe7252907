"""FSDP2 QLoRA on 1, 2, 4 and 8 GPUs, measured beside the prediction.

    python -m benchmarks.fsdp2.scaling resources/measurements/b_fsdp2_scaling.json

The file is saved after each run and says on what hardware and when.
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.fsdp2.prediction import LAYERS, LENGTH, ROWS, VOCABULARY, WORLDS, Machine, predict
from benchmarks.fsdp2.sweeps import TINY, run_cases
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements


def measure(path: str | os.PathLike, worlds: Sequence[int], *, tiny: bool = False, timeout: float = 1800) -> None:
    """Train compiled, checkpointed steps of LAYERS' shapes on each number of GPUs, and save what comes of them.

    Args:
        path: The file. It holds "tokens_per_s" and "tokens_per_s_over_one_gpu" (baseline: the prediction with the
            all-gather bandwidth and the product rate measured here), "exposed", the share of a step beyond one GPU's,
            "peak_gib", "share" of the 4-bit bytes and "gather_bytes_per_s". The case names shapes and GPUs.
        worlds: Numbers of GPUs, of which one is 1.
        tiny: Small, on whatever there is: to see that it runs.
        timeout: Seconds of a run.
    """
    found = Measurements(path, probe(measure=not tiny))
    rate = (found.hardware["matmul_flops"] or {}).get("bfloat16")
    for shapes in ("tiny",) if tiny else LAYERS:
        case = {"rows": ROWS, "length": LENGTH, "shapes": shapes, "steps": 10, "compiled": True}
        case = {**TINY, "rows": 1} if tiny else case | {"layers": LAYERS[shapes], "vocabulary": VOCABULARY}
        alone = None
        for world in sorted(worlds):
            name = f"{shapes}, {world} GPU{'s' * (world > 1)}"
            (run,), bandwidth = run_cases([case], world, timeout)
            if "error" in run:  # 70B's layers do not fit every GPU
                print(f"SKIPPED: {name}: {run['error']}", flush=True)
                continue
            beside = {}
            if bandwidth:
                found.add("gather_bytes_per_s", name, bandwidth, "bytes/s")
            if bandwidth and rate:
                guess = predict(shapes, world, Machine("here", bandwidth, rate, math.inf))
                beside = {"predicted": guess.over_one_gpu(world)}
            found.add("tokens_per_s", name, run["tokens_per_s"], "tokens/s")
            found.add("share", name, run["share"], "fraction")
            if run["peak_gib"][0] is not None:
                found.add("peak_gib", name, max(run["peak_gib"]), "GiB")
            alone = run["tokens_per_s"] if world == 1 else alone
            if alone and world > 1:
                scaling = run["tokens_per_s"] / alone
                found.add("tokens_per_s_over_one_gpu", name, scaling, "x", baselines=beside or None)
                found.add("exposed", name, 1 - scaling / world, "fraction")
            found.save()
            print(f"{name}: {run['tokens_per_s']:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA on 1, 2, 4 and 8 GPUs, beside the prediction.")
    parser.add_argument("path", type=Path, help="the JSON file to write")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of GPUs; by default all of 1, 2, 4, 8 here")
    parser.add_argument("--tiny", action="store_true", help="small, on whatever there is: to see that it runs")
    options = parser.parse_args()
    here = torch.cuda.device_count()
    worlds = options.worlds or [world for world in WORLDS if world <= here]
    if 1 not in worlds:
        parser.error(f"--worlds must hold 1, which the others are compared with, got {worlds}")
    if not options.tiny and max(worlds) > here:
        parser.error(f"--worlds must be at most the GPUs here, {here}, got {max(worlds)}")
    measure(options.path, worlds, tiny=options.tiny)
    print(f"{options.path}: written on {probe(measure=False).describe()}")


if __name__ == "__main__":
    main()
