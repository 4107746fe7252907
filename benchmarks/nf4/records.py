"""The records of challenge A's timings: which metric and case each measured value gets."""

from collections.abc import Iterator, Mapping, Sequence

import pandas
import torch

from benchmarks.nf4.ablation import measure as measure_variants
from benchmarks.nf4.baselines import THREE_LAUNCHES
from benchmarks.nf4.harness import spread
from benchmarks.nf4.workload import bytes_per_weight, calls, make_layer
from unsloth_puzzles.bench import timing
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.markdown import table
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.bench.timing import Timing

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def add_harness(
    results: Measurements, seconds: Mapping[str, Mapping], baseline: str, rounds: int
) -> Iterator[tuple[str, float, float, tuple[float, float, float]]]:
    """Record the harness case by case, then all cases together.

    Args:
        results: Gets "official_harness_speedup" and "official_harness_us" of each case.
        seconds: What `harness.measure` returned, with "ours".
        baseline: The name of the candidate that ours is compared with. A ratio is of two consecutive measurements.
        rounds: Rounds of a measurement.

    Yields:
        The case, ours and the baseline in microseconds a round, and the speed-up: median, 10th, 90th percentile.
    """
    cases = {
        f"{case.hidden}x{case.inner} {SHORT[case.dtype]}": (seconds["ours"][case], seconds[baseline][case])
        for case in seconds["ours"]
    }
    cases["all"] = tuple([sum(t) for t in zip(*seconds[name].values(), strict=True)] for name in ("ours", baseline))
    for label, (ours, theirs) in cases.items():
        ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
        mine, other = spread([1e6 * t / rounds for t in ours]), spread([1e6 * t / rounds for t in theirs])
        results.add("official_harness_speedup", label, ratio[0], "x", *ratio[1:])
        results.add("official_harness_us", label, mine[0], "us", *mine[1:], {baseline: other[0]})
        yield label, mine[0], other[0], ratio


def add_device_times(
    results: Measurements,
    hardware: Hardware,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    candidates: Mapping,
    *,
    rounds: int = 15,
) -> dict[str, Timing]:
    """Time the candidates on weights [rows, columns] and record "device_us", the speed-up and the bandwidth.

    Args:
        results: Gets the records.
        hardware: What `probe()` returned, with the copy bandwidth.
        rows: Of the weight.
        columns: Of the weight.
        dtype: Of the result.
        candidates: Functions of a layer by name: "ours", `THREE_LAUNCHES` and others.
        rounds: Samples of each candidate.
    """
    found = _device_times(hardware, rows, columns, dtype, candidates, rounds)
    moved = bytes_per_weight(dtype) * rows * columns
    case, ours, three = f"{rows}x{columns} {SHORT[dtype]}", found["ours"], found[THREE_LAUNCHES]
    others = {name: result.median for name, result in found.items() if name != "ours"}
    results.add("device_us", case, ours.median, "us", ours.low, ours.high, others)
    ratio = [three.median / ours.median, three.low / ours.high, three.high / ours.low]
    results.add("speedup_vs_unsloth_device", case, ratio[0], "x", *ratio[1:])
    share = [hardware.copy_fraction(moved, us) for us in (ours.median, ours.high, ours.low)]
    shares = {name: hardware.copy_fraction(moved, us) for name, us in others.items()}
    results.add("copy_bandwidth_fraction", case, share[0], "fraction", *share[1:], shares)
    return found


def add_sweep(results: Measurements, hardware: Hardware, sizes: Sequence[int], candidates: Mapping) -> None:
    """Record "sweep_device_us" of square fp16 weights of each size."""
    for size in sizes:
        found = _device_times(hardware, size, size, torch.float16, candidates, 15)
        ours, others = found["ours"], {name: one.median for name, one in found.items() if name != "ours"}
        results.add("sweep_device_us", f"{size}x{size} fp16", ours.median, "us", ours.low, ours.high, others)


def add_ablation(
    results: Measurements, hardware: Hardware, rows: int, columns: int, dtype: torch.dtype
) -> tuple[dict[tuple[str, str], Timing], dict[str, bool]]:
    """Record "ablation_us" of every variant, and return what `ablation.measure` returns, the checks by case."""
    shape = f"{rows}x{columns} {SHORT[dtype]}"
    timings, same = measure_variants(rows, columns, dtype, hardware)
    for (group, name), one in timings.items():
        results.add("ablation_us", f"{group}, {name}, {shape}", one.median, "us", one.low, one.high)
    torch.cuda.empty_cache()
    return timings, {f"{name}, {shape}": good for name, good in same.items()}


def beside_unsloth(sweeps: Measurements) -> str:
    """Speed-ups over the real Unsloth, in one process with ours, as a Markdown table; "" if it was not measured."""
    rows = {}
    for found in sweeps.find("harness_speedup_beside_unsloth"):
        rows.setdefault("the harness, wall clock", {})[found["case"].split("against ")[-1]] = found["value"]
    for metric, case, said in (
        ("device_us_beside_unsloth", "4096x14336 bfloat16", "GPU time, 4096x14336 bf16"),
        ("host_enqueue_us_beside_unsloth", "1024x4096 float16", "host time of a call, 1024x4096 fp16"),
    ):
        for found in sweeps.find(metric, case):
            rows[said] = {name: theirs / found["value"] for name, theirs in found["baselines"].items()}
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [(said, *(f"{row[name]:.2f}x" if name in row else "-" for name in names)) for said, row in rows.items()]
    return table(pandas.DataFrame(cells, columns=["speed-up of ours over", *names]))


def _device_times(hardware, rows, columns, dtype, candidates, rounds) -> dict[str, Timing]:
    """Over so many layers that no call finds its weight in the L2 cache."""
    moved = bytes_per_weight(dtype) * rows * columns
    sets = max(2, timing.rotations(moved, hardware.l2_bytes))
    layers = [make_layer(rows, columns, dtype, "cuda") for _ in range(sets)]
    named = {name: calls(dequantize, layers) for name, dequantize in candidates.items()}
    found = timing.device_time(named, rounds=rounds)
    del named, layers
    torch.cuda.empty_cache()
    return found
