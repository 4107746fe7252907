"""Tool calling of SmolLM2 over seeds, without quantisation, and with GRPO after it: too long for the notebook.

    python -m benchmarks.tool_calling.sweeps resources/measurements/d_tool_calling_sweeps.json

It needs a GPU. Each case is saved as soon as it is measured.
"""

import os
import statistics
import time
from collections.abc import Mapping

import torch

from benchmarks.command import run_sweep
from benchmarks.smollm2 import load
from benchmarks.tool_calling import grpo
from benchmarks.tool_calling.data import test_questions
from benchmarks.tool_calling.evaluate import AFTER_AN_ERROR, HELD_OUT, METRICS, Share, evaluate, wrong
from benchmarks.tool_calling.merged import merged
from benchmarks.tool_calling.train import fine_tune
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.hardware import Hardware, probe
from unsloth_puzzles.bench.record import Measurements

RUNS = {f"NF4, seed {seed}": {"four_bit": True, "seed": seed} for seed in range(3)}
RUNS |= {"16 bits, seed 0": {"four_bit": False, "seed": 0}}  # the last one, which GRPO goes on from
SHOWN = (*METRICS, HELD_OUT, AFTER_AN_ERROR)
FOLDER = "build/model"  # holds SmolLM2's file, or gets it
GRPO_STEPS = 20
COMPARED = 5  # first and last steps of GRPO


def measure(path: str | os.PathLike, hardware: Hardware | None = None, *, folder: str = FOLDER) -> Measurements:
    """Train and evaluate all RUNS, then go on with GRPO from the last one.

    Args:
        path: The JSON file.
        hardware: What `probe()` returned.
        folder: Holds SmolLM2's GGUF file, or gets it.

    Returns:
        Metrics "tool_calling" (the shares in SHOWN with their 95 % intervals, and before the training) and
        "tool_calling_reward" (mean of GRPO's last COMPARED steps, and of its first).

    Raises:
        OSError: SmolLM2 cannot be had.
    """
    hardware = hardware or probe(measure=False)
    found, questions = Measurements(path, hardware), test_questions()
    for run, given in RUNS.items():
        free_memory()
        start = time.perf_counter()
        dtype = _dtype(hardware, given["four_bit"])
        model, tokenizer, source = load(folder, device=hardware.device, dtype=dtype, four_bit=given["four_bit"])
        print(f"{run}: {source}", flush=True)
        before, _ = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
        model, _ = fine_tune(model, tokenizer, seed=given["seed"])
        after, done = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
        _keep(found, run, before, after, time.perf_counter() - start)
        print("\n".join(wrong(questions, done)), flush=True)
    start = time.perf_counter()
    half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    rewards = [step["reward"] for step in grpo.train(model, tokenizer, steps=GRPO_STEPS, **half)]
    first, last = (statistics.mean(steps) for steps in (rewards[:COMPARED], rewards[-COMPARED:]))
    compared = {f"first {COMPARED} steps": first}
    case = f"{run}, then {GRPO_STEPS} steps of GRPO"
    found.add("tool_calling_reward", f"{case}, last {COMPARED}", last, "reward", baselines=compared)
    again, _ = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
    _keep(found, case, after, again, time.perf_counter() - start)
    return found


def _dtype(hardware: Hardware, four_bit: bool) -> torch.dtype:
    """In NF4 that of the notebook on every GPU."""
    if hardware.device == "cpu":
        return torch.float32
    return torch.bfloat16 if hardware.bf16 and not four_bit else torch.float16


def _keep(
    found: Measurements, run: str, before: Mapping[str, Share], after: Mapping[str, Share], seconds: float
) -> None:
    for name in SHOWN:
        if name in after:
            share = after[name]
            baselines = {"before": before[name].value} if name in before else None
            found.add("tool_calling", f"{name}, {run}", share.value, "fraction", *share.interval, baselines=baselines)
    found.save()
    print(f"{run}: exact calls {before['exact call']} -> {after['exact call']}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    run_sweep(measure, "Tool calling over seeds, in 16 bits, and with GRPO.")
