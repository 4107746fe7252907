"""One GPU and several: speed over the rows of a step, memory of the whole 8B, and losses in 16 bits for three seeds.

    python -m benchmarks.fsdp2.sweeps resources/measurements/b_fsdp2_sweeps.json

It needs at least two GPUs. The file is saved after each group of runs and says on what hardware and when.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.fsdp2.ranks import start_ranks
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

ROWS = (1, 2, 4, 8)  # a GPU
CURVE = {"layers": 16, "steps": 12}
PARITY = {"layers": 4, "length": 512, "steps": 60, "checkpointing": True}
SEEDS = (1, 2, 3)
WHOLE = {"rows": 1, "layers": 32, "steps": 6, "dtype": "float16", "compiled": True}  # all of Llama 3.1 8B
TINY = {"shapes": "tiny", "layers": 2, "vocabulary": 256, "length": 24, "steps": 4}


def measure(path: str | os.PathLike, ranks: int, *, tiny: bool = False, timeout: float = 1200) -> Measurements:
    """Make all runs in one process and in `ranks`, and save what comes of them.

    Args:
        path: The file.
        ranks: Processes, each with a GPU of its own.
        tiny: Small, on whatever there is: to see that it runs.
        timeout: Seconds of a group of runs.

    Returns:
        Metrics "tokens_per_s" (the baseline is one GPU) and "scaling" over it, "step_over_one_gpu" (a step over the
        same rows a GPU without communication), "peak_gib", "loss_difference" (baseline: one GPU that sums its rows in
        two orders), "gather_bytes_per_s".
    """
    found = Measurements(path)
    _curve(found, ranks, tiny, timeout)
    found.save()
    _parity(found, ranks, tiny, timeout)
    found.save()
    _memory(found, ranks, tiny, timeout)
    found.save()
    return found


def _curve(found: Measurements, ranks: int, tiny: bool, timeout: float) -> None:
    given = TINY if tiny else CURVE
    names = ("uncompiled",) if tiny else ("uncompiled", "compiled")
    cases = [{**given, "rows": rows, "compiled": name == "compiled"} for name in names for rows in ROWS]
    one, _ = _run(cases, 1, timeout)
    many, bandwidth = _run(cases, ranks, timeout)
    if bandwidth:
        found.add("gather_bytes_per_s", "all-gather of a layer's size", bandwidth, "bytes/s")
    for case, alone, shared in zip(cases, one, many, strict=True):
        name = f"{'compiled' if case['compiled'] else 'uncompiled'}, {case['rows']} rows a GPU"
        if "error" in alone or "error" in shared:
            print(f"SKIPPED: {name}: {alone.get('error') or shared.get('error')}", flush=True)
            continue
        beside = {"one GPU": alone["tokens_per_s"]}
        found.add("tokens_per_s", name, shared["tokens_per_s"], "tokens/s", baselines=beside)
        found.add("scaling", name, shared["tokens_per_s"] / alone["tokens_per_s"], "x")
        found.add("step_over_one_gpu", name, _middle(shared) / _middle(alone), "x")
        if shared["peak_gib"][0] is not None:
            peaks = {"one GPU": alone["peak_gib"][0]}
            found.add("peak_gib", name, max(shared["peak_gib"]), "GiB", baselines=peaks)


def _parity(found: Measurements, ranks: int, tiny: bool, timeout: float) -> None:
    """Losses of the same rows: all in one process, summed there in two orders, and a row each rank."""
    given = TINY if tiny else PARITY
    dtypes = ("float32",) if tiny else ("float32", "bfloat16", "float16")
    settings = [{**given, "dtype": dtype, "seed": seed} for dtype in dtypes for seed in SEEDS]
    whole, _ = _run([{**each, "rows": ranks} for each in settings], 1, timeout)
    regrouped, _ = _run([{**each, "rows": ranks, "accumulation": ranks} for each in settings], 1, timeout)
    shared, _ = _run([{**each, "rows": 1} for each in settings], ranks, timeout)
    for each, a, b, c in zip(settings, whole, regrouped, shared, strict=True):
        beside = {"one GPU, rows in another order": _apart(a, b)}
        found.add("loss_difference", f"{each['dtype']}, seed {each['seed']}", _apart(a, c), "loss", baselines=beside)


def _memory(found: Measurements, ranks: int, tiny: bool, timeout: float) -> None:
    given = {**TINY, "rows": 1} if tiny else WHOLE
    for name, more in (("whole model", {}), ("whole model, CPU offload", {"offload": True})):
        ((case,), _) = _run([{**given, **more}], ranks, timeout)
        found.add("share", name, case["share"], "fraction")
        if case["peak_gib"][0] is not None:
            found.add("peak_gib", name, max(case["peak_gib"]), "GiB")
            found.add("rest_gib", name, case["rest_gib"], "GiB")


def _run(cases: list[dict], ranks: int, timeout: float) -> tuple[list[dict], float | None]:
    """What `steps` measures of each case, and the bandwidth of its all-gathers."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "cases.json"), Path(folder, "out.json")
        given.write_text(json.dumps(cases))
        start_ranks("benchmarks.fsdp2.steps", str(out), str(given), ranks=ranks, timeout=timeout)
        found = json.loads(out.read_text())
    return found["cases"], found["gather_bytes_per_s"]


def _middle(case: dict) -> float:
    return statistics.median(case["step_ms"][len(case["step_ms"]) // 2 :])


def _apart(a: dict, b: dict) -> float:
    return max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare one GPU and several, at Llama 3.1 8B's layer shapes.")
    parser.add_argument("path", type=Path, help="the JSON file to write")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small, on whatever there is: to see that it runs")
    options = parser.parse_args()
    if not options.tiny and torch.cuda.device_count() < options.ranks:
        parser.error(f"--ranks must be at most the GPUs here, {torch.cuda.device_count()}, got {options.ranks}")
    measure(options.path, options.ranks, tiny=options.tiny)
    print(f"{options.path}: written on {probe(measure=False).describe()}")


if __name__ == "__main__":
    main()
