"""Llama 3.2 1B trained from the same seed with the standard loss, with ours, and with two faults planted into ours.

    curves = run("full")                                        # {"standard": {...}, "ours": {...}, ...}
    differences(curves["standard"], curves["ours"])             # of the losses, a step each
    norm_differences(curves["standard"], curves["ours"])        # of the gradients' norms, relative

One process makes all runs, one after the other, and writes its results after every run; each JSON object gives the
fields of a `Settings`:

    python -m benchmarks.backprop.llama_curve --out curves.json '{"mode": "full"}' '{"mode": "qlora"}'

The runs differ in the loss alone: same weights, batches, optimiser and learning rates, attention written out (its fused
backward adds in any order), deterministic algorithms, no TF32. What is left is the rounding of sums taken in another
order, which training then amplifies. A comparison that does not see a planted fault would prove nothing.
"""

import argparse
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.backprop.curve_data import FAULTS, RUNS, Settings
from benchmarks.backprop.curve_training import train
from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.record import write_json

_OF_A_RUN = {"run", "losses", "gradient_norms", "labels", "loss_calls", "peak_gib", "before_gib", "seconds"}


def run(
    mode: str, *, timeout: float = 900, show: Callable[[str], None] | None = print, **settings
) -> dict[str, dict | str]:
    """All runs of `mode` in a process of their own.

    Args:
        mode: "full" or "qlora".
        timeout: Seconds for all runs together. What is finished by then is returned.
        show: Is given the lines of progress.
        settings: Other fields of `Settings`.

    Returns:
        By run (`curve_data.RUNS`): the reason why it failed, or a dict with the settings and "losses" (each step's
        mean loss over its labels), "gradient_norms" (Euclidean, of all trained parameters together; None where it
        is not finite, and the gradient scaler skips the step), "labels" (their numbers, by step and micro-batch),
        "peak_gib" and "before_gib" (`torch.cuda.max_memory_allocated`, and what was
        allocated before the first step: weights; None without a GPU), "seconds", "weights" (their source),
        "layers" (what the 4-bit ones are), "parameters" (their number), "text", "hardware", "loss_calls" (of our loss).

    Raises:
        ValueError: A setting that cannot be.
    """
    return _in_one_process({mode: settings}, timeout, show)[mode]


def _in_one_process(settings: Mapping[str, Mapping], timeout: float, show) -> dict[str, dict[str, dict | str]]:
    """By mode what `run` returns."""
    decided = [Settings(mode=mode, **given).decided() for mode, given in settings.items()]
    given = [json.dumps({"mode": mode, **of}) for mode, of in settings.items()]
    more = {"TRITON_INTERPRET": "1"} if decided[0].device == "cpu" else {}  # for the NF4 kernel
    if decided[0].device == "cpu" and decided[0].tiny:
        more["OMP_NUM_THREADS"] = "1"  # its products are too short for several
    # Sums in cuBLAS are repeatable only with a workspace of a fixed size.
    # Full fine-tuning needs nearly all of a T4's memory, so none may be lost between blocks.
    more["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    environment = child.environment(CUBLAS_WORKSPACE_CONFIG=":4096:8", **more)
    reason = "the process ended before this run"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "curves.json")
        try:
            child.run(__name__, f"--out={out}", *given, timeout=timeout, env=environment, show=show)
        except child.ChildError as error:
            reason = str(error)
        found = json.loads(out.read_text()) if out.exists() else {}
    return {mode: {name: found.get(mode, {}).get(name, reason) for name in RUNS[mode]} for mode in settings}


def run_modes(
    settings: Mapping[str, Mapping],
    *,
    together: bool = False,
    timeout: float = 900,
    show: Callable[[str], None] | None = print,
) -> Iterator[tuple[str, dict[str, dict | str]]]:
    """(mode, what `run` returns) for each mode of `settings`, {mode: other fields of `Settings`}.

    Args:
        settings: By mode.
        together: Give each mode a process of its own, side by side; their peaks are their own, their seconds are not.
            Otherwise one process runs all modes.
        timeout: Seconds for each mode.
        show: Is given the lines of progress.
    """
    if not together:
        yield from _in_one_process(settings, timeout * len(settings), show).items()
        return
    options = {"timeout": timeout, "show": show}
    with ThreadPoolExecutor(len(settings)) as pool:
        try:
            futures = {mode: pool.submit(run, mode, **options, **given) for mode, given in settings.items()}
            yield from ((mode, future.result()) for mode, future in futures.items())
        except BaseException:  # an interrupt: else the pool would wait for its processes
            child.end_all()
            raise


def differences(standard: dict, other: dict) -> list[float]:
    """|loss - loss| of each step that both have.

    Raises:
        ValueError: They were not the same training but for the loss, or one that has no fault ended early.
    """
    _need_same_training(standard, other)
    return [abs(a - b) for a, b in zip(standard["losses"], other["losses"], strict=other["run"] not in FAULTS)]


def norm_differences(standard: dict, other: dict) -> list[float]:
    """|norm - norm| / norm of each step's gradients; raises as `differences` does.

    NaN for a step that both runs skipped, infinite for a step that one run skipped.
    """
    _need_same_training(standard, other)
    norms = zip(standard["gradient_norms"], other["gradient_norms"], strict=other["run"] not in FAULTS)
    return [_norm_difference(a, b) for a, b in norms]


def pass_means(curve: dict) -> list[float]:
    """The mean loss of each pass over the batches: every mean is over the same labels, except in a pass cut short."""
    size, losses = -(-curve["steps"] // curve["passes"]), curve["losses"]
    passes = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [sum(each) / len(each) for each in passes]


def title(curve: dict) -> str:
    """Name the run of a `curve`: model, weights, dtype, optimiser, learning rate, batch, text, hardware."""
    size = "tiny Llama" if curve["parameters"] < 1e7 else f"Llama of {curve['parameters'] / 1e6:.0f} M parameters"
    model = "Llama 3.2 1B" if 1.2e9 < curve["parameters"] < 1.3e9 else size
    full = curve["mode"] == "full"
    kind = "full fine-tuning, tied head" if full else f"QLoRA, {curve['layers']}, r = 16"
    optimizer = "SGD without momentum" if full else "AdamW"
    batch = f"{curve['accumulation']} x {curve['batch']} sequences of up to {curve['length']} tokens a step"
    return (
        f"{model}, {curve['weights']}; {kind}, {curve['dtype']}, {optimizer}, "
        f"learning rate {curve['learning_rate']:g}\n{batch}, {curve['text']}; {curve['hardware']}"
    )


def _norm_difference(standard: float | None, other: float | None) -> float:
    if standard is None or other is None:
        return math.nan if standard is other else math.inf
    return abs(standard - other) / standard


def _need_same_training(standard: dict, other: dict) -> None:
    for name in standard.keys() - _OF_A_RUN:
        if standard[name] != other[name]:
            raise ValueError(f"{name} must be the same in both runs, got {standard[name]!r} and {other[name]!r}")


def main(given: list[str]) -> None:
    """Make all runs of the settings that the command line gives; a run that fails is kept as its reason."""
    parser = argparse.ArgumentParser(description="Trainings of Llama that differ in their loss.")
    parser.add_argument("settings", nargs="+", type=json.loads, help="fields of Settings as a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write: {mode: {run: result}}")
    arguments = parser.parse_args(given)
    found = {}
    for settings in [Settings(**fields) for fields in arguments.settings]:
        of_mode = found.setdefault(settings.mode, {})
        for name in RUNS[settings.mode]:
            try:
                of_mode[name] = train(settings, name)
            except Exception as error:  # out of memory, say: the other runs may fit
                of_mode[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                print(f"FAILED: {settings.mode}, {name}: {of_mode[name]}", flush=True)
                traceback.clear_frames(error.__traceback__)
            write_json(arguments.out, found)
            free_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
