"""Llama 3.2 1B trained twice from the same seed, with the standard loss and with ours: curves, difference, peak memory.

    standard, ours = (run("full", loss) for loss in ("standard", "ours"))
    differences(standard, ours)      # a step each
    fall(ours), title(ours)

Each `run` is one training in a process of its own, for its peak memory is that process's:

    python -m unsloth_puzzles.comparisons.llama_curve --mode full --loss ours --out ours.json

The two trainings differ in the loss alone: same weights, batches, optimiser and learning rates, attention written out
(its fused backward adds in any order), deterministic algorithms, no TF32. What is left is the rounding of sums taken in
another order, which training then amplifies.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from unsloth_puzzles.bench import child
from unsloth_puzzles.comparisons.curve_training import Settings, train


def run(mode: str, loss: str, *, timeout: float = 600, **settings) -> dict | str:
    """One training in a process of its own; the reason if it failed (out of memory, say).

    Settings: the fields of `Settings`. Keys of the result: "losses" (each step's mean loss over its labels), "labels"
    (their numbers, by step and micro-batch), "peak_gib" and "before_gib" (`torch.cuda.max_memory_allocated`, and what
    was allocated before the first step: weights; None without a GPU), "seconds", "weights" (their source), "text",
    "hardware", "loss_calls" (of ours), and the settings. Raises ValueError for a setting that cannot be.
    """
    Settings(mode=mode, loss=loss, **settings).decided()
    arguments = {"mode": mode, "loss": loss, **settings}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if value is not None]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "curve.json")
        command = [sys.executable, "-m", "unsloth_puzzles.comparisons.llama_curve", *given, f"--out={out}"]
        on_cpu = settings.get("device") == "cpu" or not torch.cuda.is_available()
        interpret = {"TRITON_INTERPRET": "1"} if on_cpu else {}  # for the NF4 kernel
        # Sums in cuBLAS are repeatable only with a workspace of a fixed size.
        environment = child.environment(CUBLAS_WORKSPACE_CONFIG=":4096:8", **interpret)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return f"took more than {timeout:.0f} s"
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            return last[0] if last else f"exit status {done.returncode}"
        return json.loads(out.read_text())


def differences(standard: dict, ours: dict) -> list[float]:
    """|loss - loss| of each step. Raises ValueError if the two were not the same training but for the loss."""
    for name in standard.keys() - {"losses", "loss", "loss_calls", "peak_gib", "before_gib", "seconds", "chunk_size"}:
        if standard[name] != ours[name]:
            raise ValueError(f"{name}: got {standard[name]!r} and {ours[name]!r}, need the same training")
    return [abs(a - b) for a, b in zip(standard["losses"], ours["losses"], strict=True)]


def fall(curve: dict, ends: int = 10) -> float:
    """By how much the mean loss of the last `ends` steps lies below that of the first."""
    first, last = curve["losses"][:ends], curve["losses"][-ends:]
    return sum(first) / len(first) - sum(last) / len(last)


def title(curve: dict) -> str:
    """What a figure of `curve` has to say: model, weights, dtype, optimiser, learning rate, batch, text, hardware."""
    model = "tiny Llama" if curve["tiny"] else "Llama 3.2 1B"
    kind = "full fine-tuning, tied head" if curve["mode"] == "full" else "QLoRA, NF4 by patch_linear4bit, r = 16"
    optimizer = "AdamW" if curve["optimizer"] == "adamw" else "8-bit AdamW"
    batch = f"{curve['accumulation']} x {curve['batch']} sequences of up to {curve['length']} tokens a step"
    return (
        f"{model}, {curve['weights']}; {kind}, {curve['dtype']}, {optimizer}, "
        f"learning rate {curve['learning_rate']:g}\n{batch}, {curve['text']}; {curve['hardware']}"
    )


def main(given: list[str]) -> None:
    """Train as the command line says, and write the result as JSON."""
    parser = argparse.ArgumentParser(description="One training of Llama with one of two losses.")
    for field in dataclasses.fields(Settings):
        kind = next(k for k in (bool, int, float, str) if k.__name__ in str(field.type))
        read = (lambda text: text == "True") if kind is bool else kind
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=read, default=field.default)
    parser.add_argument("--out", required=True)
    arguments = vars(parser.parse_args(given))
    out = arguments.pop("out")
    Path(out).write_text(json.dumps(train(Settings(**arguments))))


if __name__ == "__main__":
    main(sys.argv[1:])
