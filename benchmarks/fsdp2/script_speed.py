"""The training script on one GPU with challenge A's kernel and with bitsandbytes' de-quantisation.

    python -m benchmarks.fsdp2.script_speed resources/measurements/b_fsdp2_script.json

Both kinds of runs are the script's own command line, uncompiled, with activation checkpointing: stock SFTTrainer,
clipping, AdamW. The model has 8B's layers and random weights. Runs of both kinds take turns, first one and then the
other kind first, and each is a process of its own. A run's figure is the median step of its second half.
"""

import os
import statistics
import tempfile

from benchmarks.command import run_sweep
from benchmarks.fsdp2 import script
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

OURS, THEIRS = "ours", "bitsandbytes"
LAYERS, LENGTH, ROUNDS = 8, 2048, 4


def measure(
    path: str | os.PathLike, hardware: Hardware | None = None, rounds: int = ROUNDS, timeout: float = 300
) -> Measurements:
    """Run the script `rounds` times with each kernel, and save what a step took.

    Args:
        path: The file.
        hardware: As `Measurements` takes it.
        rounds: Runs of each kind.
        timeout: Seconds of a run.

    Returns:
        Metrics: "step_ms" of the script with A's kernel, beside bitsandbytes', and "script_speedup", the median ratio
        of a round's two runs with the smallest and the largest.
    """
    found = Measurements(path, hardware)
    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    with tempfile.TemporaryDirectory() as folder:
        model, layers, kind, source = script.random_model(folder, LAYERS)
        print(source)
        for number in range(rounds):
            for kernel in (OURS, THEIRS)[:: 1 if number % 2 == 0 else -1]:
                given = (*layers, "--rows", "1", "--length", str(LENGTH), "--steps", str(script.STEPS))
                run = script.run_uncompiled(kernel, model, *given, folder=folder, timeout=timeout)
                times[kernel].append(run["seconds"] * 1e3)
                print(f"round {number + 1} of {rounds}, {kernel}: {times[kernel][-1]:.1f} ms a step", flush=True)
    case = f"script, {kind}, 1 x {LENGTH} tokens"
    ours, theirs = (statistics.median(times[kernel]) for kernel in (OURS, THEIRS))
    found.add("step_ms", case, ours, "ms", min(times[OURS]), max(times[OURS]), {THEIRS: theirs})
    ratios = [theirs / ours for ours, theirs in zip(times[OURS], times[THEIRS], strict=True)]
    found.add("script_speedup", case, statistics.median(ratios), "x", min(ratios), max(ratios))
    found.save()
    return found


if __name__ == "__main__":
    run_sweep(measure, "The script with A's kernel and with bitsandbytes' de-quantisation.")
