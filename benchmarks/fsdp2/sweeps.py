"""One GPU and several: speed over the rows of a step, memory of the whole 8B, losses in 16 bits, compilations.

    python -m benchmarks.fsdp2.sweeps resources/measurements/b_fsdp2_sweeps.json

It needs at least two GPUs. The file is saved after each group of runs and says on what hardware and when.
"""

import argparse
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.at_once import all_at_once
from benchmarks.fsdp2.ranks import start_ranks
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

ROWS = (1, 2, 4, 8)  # a GPU
CURVE = {"layers": 16, "steps": 10}
PARITY = {"layers": 4, "length": 512, "steps": 60, "checkpointing": True}
SEEDS = (1, 2, 3)
WHOLE = {"rows": 1, "layers": 32, "steps": 6, "dtype": "float16", "compiled": True}  # all of Llama 3.1 8B
LENGTHS = [128 + 37 * step for step in range(50)]
MANY = {"rows": 1, "layers": 2, "vocabulary": 32000, "length": LENGTHS, "steps": len(LENGTHS), "compiled": True}
MOST_HELD_GIB = 0.06  # allocated before a case, such as workspaces; more is a model of an earlier one
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
        two orders), "gather_bytes_per_s", and over many lengths "compilations" and "graph_breaks".
    """
    found = Measurements(path)
    _memory(found, ranks, tiny, timeout)
    found.save()
    curve, (whole, regrouped, split) = _curve_cases(tiny), _parity_cases(ranks, tiny)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    alone = {  # on one GPU each, side by side: nothing of the second is timed
        "curve": partial(run_cases, curve, 1, timeout, gpus[0]),
        "losses": partial(run_cases, whole + regrouped, 1, timeout, gpus[-1]),
    }
    one = all_at_once(alone, together=len(gpus) > 1)
    _add_curve(found, curve, one["curve"][0], *run_cases(curve, ranks, timeout))
    found.save()
    _add_parity(found, split, one["losses"][0], run_cases(split, ranks, timeout)[0])
    found.save()
    _lengths(found, ranks, tiny, timeout)
    found.save()
    return found


def _curve_cases(tiny: bool) -> list[dict]:
    given = TINY if tiny else CURVE
    kinds = (False,) if tiny else (False, True)
    return [{**given, "rows": rows, "compiled": compiled} for compiled in kinds for rows in ROWS]


def _add_curve(
    found: Measurements, cases: list[dict], one: list[dict], many: list[dict], bandwidth: float | None
) -> None:
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
        if _memory_is_its_own(name, alone, shared):
            peaks = {"one GPU": alone["peak_gib"][0]}
            found.add("peak_gib", name, max(shared["peak_gib"]), "GiB", baselines=peaks)


def _parity_cases(ranks: int, tiny: bool) -> tuple[list[dict], list[dict], list[dict]]:
    """The same rows: all in one process, summed there in two orders, and a row each rank."""
    given = TINY if tiny else PARITY
    dtypes = ("float32",) if tiny else ("float32", "bfloat16", "float16")
    settings = [{**given, "dtype": dtype, "seed": seed} for dtype in dtypes for seed in SEEDS]
    whole = [{**each, "rows": ranks} for each in settings]
    regrouped = [{**each, "rows": ranks, "accumulation": ranks} for each in settings]
    return whole, regrouped, [{**each, "rows": 1} for each in settings]


def _add_parity(found: Measurements, cases: list[dict], alone: list[dict], shared: list[dict]) -> None:
    whole, regrouped = alone[: len(cases)], alone[len(cases) :]
    for case, a, b, c in zip(cases, whole, regrouped, shared, strict=True):
        beside = {"one GPU, rows in another order": _apart(a, b)}
        name = f"{case.get('dtype', 'bfloat16')}, seed {case['seed']}"
        found.add("loss_difference", name, _apart(a, c), "loss", baselines=beside)


def _memory(found: Measurements, ranks: int, tiny: bool, timeout: float) -> None:
    given = {**TINY, "rows": 1} if tiny else WHOLE
    cases = {"whole model": {}, "whole model, CPU offload": {"offload": True}}
    for name, more in cases.items():
        ((case,), _) = run_cases([{**given, **more}], ranks, timeout)  # alone: a case may leave memory allocated
        if "error" in case:
            print(f"SKIPPED: {name}: {case['error']}", flush=True)
            continue
        add_memory(found, name, case)


def add_memory(found: Measurements, name: str, case: dict) -> None:
    """Add the share of the 4-bit bytes and, where it is the case's own, the memory of a rank."""
    found.add("share", name, case["share"], "fraction")
    if _memory_is_its_own(name, case):
        found.add("peak_gib", name, max(case["peak_gib"]), "GiB")
        found.add("rest_gib", name, case["rest_gib"], "GiB")


def _memory_is_its_own(name: str, *cases: dict) -> bool:
    """Whether the memory was measured, and no case held any before it began."""
    if any(case["peak_gib"][0] is None for case in cases):
        return False
    held = max(case["held_gib"] for case in cases)
    if held > MOST_HELD_GIB:
        print(f"SKIPPED: memory of {name}: {held:.2f} GiB were allocated before it", flush=True)
    return held <= MOST_HELD_GIB


def _lengths(found: Measurements, ranks: int, tiny: bool, timeout: float) -> None:
    given = {**TINY, "rows": 1, "length": [20, 24, 28]} if tiny else MANY
    ((case,), _) = run_cases([given], ranks, timeout)
    name = f"{len(given['length'])} lengths"
    found.add("compilations", name, case["compilations"], "compilations")
    found.add("graph_breaks", name, case["graph_breaks"], "graph breaks")


def run_cases(
    cases: list[dict], ranks: int, timeout: float, gpus: str | None = None
) -> tuple[list[dict], float | None]:
    """Measure each case by `steps`, and the bandwidth of its all-gathers."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "cases.json"), Path(folder, "out.json")
        given.write_text(json.dumps(cases))
        start_ranks("benchmarks.fsdp2.steps", str(out), str(given), ranks=ranks, timeout=timeout, gpus=gpus)
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
