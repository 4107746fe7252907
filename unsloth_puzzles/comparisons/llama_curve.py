"""Llama 3.2 1B trained from the same seed with the standard loss, with ours, and with two faults planted into ours.

    curves = run("full")                                        # {"standard": {...}, "ours": {...}, ...}
    differences(curves["standard"], curves["ours"])             # of the losses, a step each
    norm_differences(curves["standard"], curves["ours"])        # of the gradients' norms, relative

One process makes all runs of a mode, one after the other, and writes its results after every run:

    python -m unsloth_puzzles.comparisons.llama_curve --mode full --out curves.json

The runs differ in the loss alone: same weights, batches, optimiser and learning rates, attention written out (its fused
backward adds in any order), deterministic algorithms, no TF32. What is left is the rounding of sums taken in another
order, which training then amplifies. A comparison that does not see a planted fault would prove nothing.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.comparisons.curve_data import FAULTS, RUNS, Settings
from unsloth_puzzles.comparisons.curve_training import train

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
        mean loss over its labels), "gradient_norms" (Euclidean, of all trained parameters together), "labels" (their
        numbers, by step and micro-batch), "peak_gib" and "before_gib" (`torch.cuda.max_memory_allocated`, and what was
        allocated before the first step: weights; None without a GPU), "seconds", "weights" (their source),
        "layers" (what the 4-bit ones are), "parameters" (their number), "text", "hardware", "loss_calls" (of our loss).

    Raises:
        ValueError: A setting that cannot be.
    """
    decided = Settings(mode=mode, **settings).decided()
    given = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    more = {"TRITON_INTERPRET": "1"} if decided.device == "cpu" else {}  # for the NF4 kernel
    if decided.device == "cpu" and decided.tiny:
        more["OMP_NUM_THREADS"] = "1"  # its products are too short for several
    # Sums in cuBLAS are repeatable only with a workspace of a fixed size.
    # Full fine-tuning needs nearly all of a T4's memory, so none may be lost between blocks.
    more["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    environment = child.environment(CUBLAS_WORKSPACE_CONFIG=":4096:8", **more)
    reason = "the process ended before this run"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "curves.json")
        try:
            child.run(
                "unsloth_puzzles.comparisons.llama_curve", f"--mode={mode}", *given, f"--out={out}",
                timeout=timeout, env=environment, show=show,
            )  # fmt: skip
        except child.ChildError as error:
            reason = str(error)
        found = json.loads(out.read_text()) if out.exists() else {}
    return {name: found.get(name, reason) for name in RUNS[mode]}


def run_modes(
    settings: Mapping[str, Mapping], *, together: bool = False, **options
) -> Iterator[tuple[str, dict[str, dict | str]]]:
    """(mode, what `run` returns) for each mode of `settings`, {mode: other fields of `Settings`}.

    Args:
        settings: By mode.
        together: Run the processes side by side; their peaks are their own, their seconds are not.
        options: Of `run`.
    """
    if not together:
        for mode, given in settings.items():
            yield mode, run(mode, **options, **given)
        return
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
    """|norm - norm| / norm of each step's gradients; raises as `differences` does."""
    _need_same_training(standard, other)
    norms = zip(standard["gradient_norms"], other["gradient_norms"], strict=other["run"] not in FAULTS)
    return [abs(a - b) / a for a, b in norms]


def pass_means(curve: dict) -> list[float]:
    """The mean loss of each pass over the batches: every mean is over the same labels, except in a pass cut short."""
    size, losses = -(-curve["steps"] // curve["passes"]), curve["losses"]
    passes = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [sum(each) / len(each) for each in passes]


def title(curve: dict) -> str:
    """What a figure of `curve` has to say: model, weights, dtype, optimiser, learning rate, batch, text, hardware."""
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


def _need_same_training(standard: dict, other: dict) -> None:
    for name in standard.keys() - _OF_A_RUN:
        if standard[name] != other[name]:
            raise ValueError(f"{name} must be the same in both runs, got {standard[name]!r} and {other[name]!r}")


def main(given: list[str]) -> None:
    """Make all runs of the mode that the command line gives; a run that fails is kept as its reason."""
    parser = argparse.ArgumentParser(description="Trainings of Llama that differ in their loss.")
    for field in dataclasses.fields(Settings):
        kind = next(k for k in (bool, int, float, str) if k.__name__ in str(field.type))
        read = (lambda text: text == "True") if kind is bool else kind
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=read, default=field.default)
    parser.add_argument("--out", required=True, type=Path)
    arguments = vars(parser.parse_args(given))
    out = arguments.pop("out")
    settings, found = Settings(**arguments), {}
    for name in RUNS[settings.mode]:
        try:
            found[name] = train(settings, name)
        except Exception as error:  # out of memory, say: the other runs may fit
            found[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            print(f"FAILED: {settings.mode}, {name}: {found[name]}", flush=True)
            traceback.clear_frames(error.__traceback__)
        _write(out, found)
        free_memory()


def _write(path: Path, found: dict) -> None:
    """All of the file or nothing, so that whoever reads it after a kill finds the runs before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(found))
    os.replace(unfinished, path)


if __name__ == "__main__":
    main(sys.argv[1:])
