"""Candidates that may fail, one by one and in turn: what each comes to, and the times of those that fit."""

import traceback
from collections.abc import Callable

import torch

from benchmarks.backprop.workload import release
from unsloth_puzzles.bench.experiments import failed
from unsloth_puzzles.bench.memory import peak_memory
from unsloth_puzzles.bench.timing import event_time, wall_time

OURS, OURS_KEPT, OURS_FLOAT32 = "ours", "ours, logits kept", "ours, float32 dW"


def measure_candidates(
    what: str, calls: dict[str, Callable], one: Callable, device: str, rounds: int
) -> dict[str, dict]:
    """`one(call)` of each candidate, and the times of all in turn; without those that fail.

    Anyone may run out of memory. Another error is let through if it is ours.
    """
    results = {}
    for name, call in calls.items():
        try:
            results[name] = one(call)
        except Exception as error:
            if name in (OURS, OURS_KEPT, OURS_FLOAT32) and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            failed(f"GRPO, {what}, {name}", reason)
            traceback.clear_frames(error.__traceback__)
        release()
    timer = event_time if torch.device(device).type == "cuda" else wall_time
    fit = {name: calls[name] for name in results}
    for name, timing in (timer(fit, rounds=rounds) if fit else {}).items():
        results[name]["time"] = timing
    return results


def peak_gib(call: Callable[[], object]) -> float:
    return peak_memory(call)[1] / 2**30
