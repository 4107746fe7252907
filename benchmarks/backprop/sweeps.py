"""Time and memory over the chunk size and over the vocabulary: too long for a notebook, so kept as a file of their own.

    python -m benchmarks.backprop.sweeps resources/measurements/e_backprop_sweeps.json

The file says on what hardware and when.
"""

import argparse
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from benchmarks.backprop.baselines import FLOOR_FLOAT32, LIGER, LIGER_FLOAT32
from benchmarks.backprop.linear_losses import (
    CHUNK_SIZES,
    OURS,
    OURS_ALL_ROWS,
    OURS_FLOAT32,
    VOCABULARIES,
    Results,
    frontier,
    losses,
    of_labelled_rows,
    vocabulary_sweep,
)
from benchmarks.backprop.linear_losses import measure as measure_calls
from benchmarks.backprop.workload import REFERENCE, TINY, Case, Shape, make_case, release
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

HEADS = {"head trained": True, "head frozen": False}
WITHOUT_LABEL = 0.8  # share of the rows, as where only answers of conversations are learnt
ONE_DTYPE = (OURS_FLOAT32, LIGER_FLOAT32, FLOOR_FLOAT32)  # left out: the sweeps are about dW in the weight's dtype


def measure(
    path: str | os.PathLike,
    shape: Shape,
    device: str,
    *,
    hardware: Hardware | None = None,
    sizes: Iterable[int] = CHUNK_SIZES,
    vocabularies: Iterable[int] = VOCABULARIES,
    compile: bool = True,
    without: Iterable[str] = (),
    rounds: int = 4,
) -> Measurements:
    """Run both sweeps at `shape` and save them; ours is the value of each record, everything else its baselines.

    Metrics: "frontier_ms", "frontier_peak_gib", "frontier_time_over_liger" (case "head trained, 920 rows"), and
    "vocabulary_ms", "vocabulary_peak_gib" (case "vocabulary 8192"); "ignored_ms", "ignored_peak_gib" (ours projects
    only the rows that have a label); "rows" (the case says hidden size and dtype) and "frontier_vocabulary".
    """
    found = Measurements(path, hardware)
    dtype = str(shape.dtype).removeprefix("torch.")
    found.add("rows", f"hidden size {shape.hidden}, {dtype}", shape.rows, "rows")
    found.add("frontier_vocabulary", "frontier", shape.vocabulary, "tokens")
    options = {"compile": compile, "without": (*ONE_DTYPE, *without)}
    for head, train_head in HEADS.items():
        case = make_case(shape, device, train_head=train_head)
        named, _ = losses(case, **options)
        beside = {name: loss for name, loss in named.items() if name != OURS}
        for size, at in frontier(case, sizes, beside=beside, compile=compile, rounds=rounds).items():
            _add(found, "frontier", f"{head}, {size} rows", at)
            print(f"{head}, {size} rows: done", flush=True)
        del case, named, beside
        release()
        _add_ignored(
            found, head, make_case(shape, device, train_head=train_head, ignored=WITHOUT_LABEL), options, rounds
        )
        release()
    sweep = vocabulary_sweep(shape, device, vocabularies, rounds=rounds, **options)
    for size, at in sweep.items():
        _add(found, "vocabulary", f"vocabulary {size}", at)
    found.save()
    return found


def _add_ignored(found: Measurements, head: str, case: Case, options: dict, rounds: int) -> None:
    named, _ = losses(case, **options)
    named |= {OURS: of_labelled_rows(named[OURS]), OURS_ALL_ROWS: named[OURS]}
    at = measure_calls({name: partial(case.forward_backward, loss) for name, loss in named.items()}, rounds=rounds)
    _add(found, "ignored", f"{head}, {WITHOUT_LABEL:.0%} of the rows without a label", at)


def _add(found: Measurements, metric: str, case: str, at: Results) -> None:
    if OURS not in at.measured:  # out of memory, say: there is nothing to hold the others against
        return
    one = at.measured[OURS]
    others = {name: other for name, other in at.measured.items() if name != OURS}
    milliseconds = (one.time.median / 1e3, "ms", one.time.low / 1e3, one.time.high / 1e3)
    found.add(f"{metric}_ms", case, *milliseconds, {name: other.time.median / 1e3 for name, other in others.items()})
    peaks = {name: other.extra_peak_gib for name, other in others.items()}
    found.add(f"{metric}_peak_gib", case, one.extra_peak_gib, "GiB", baselines=peaks)
    if LIGER in others:
        theirs = others[LIGER].time
        spread = one.time.low / theirs.high, one.time.high / theirs.low
        found.add(f"{metric}_time_over_liger", case, one.time.median / theirs.median, "x", *spread)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sweep the chunk size and the vocabulary at the puzzle's shape.")
    parser.add_argument("path", type=Path, help="the JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small, not compiled, on the CPU: to see that it runs")
    options = parser.parse_args()
    if options.tiny:
        measure(options.path, TINY, "cpu", sizes=(128, 512), vocabularies=(512,), compile=False, rounds=1)
    elif torch.cuda.is_available():
        measure(options.path, REFERENCE, "cuda")
    else:
        parser.error("torch sees no CUDA GPU; --tiny runs on the CPU")
    print(f"{options.path}: written")


if __name__ == "__main__":
    main()
