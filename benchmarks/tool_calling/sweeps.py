"""Tool calling of SmolLM2 over seeds, without quantisation, and with GRPO after it: too long for the notebook.

    python -m benchmarks.tool_calling.sweeps resources/measurements/d_tool_calling_sweeps.json

It needs a GPU. Each run is saved as soon as it has ended.
"""

import multiprocessing
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch

from benchmarks.command import run_sweep
from benchmarks.smollm2 import checkpoint, load
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
GIB_PER_RUN = 30  # most of them while all questions are answered at once
FOLDER = "build/model"  # holds SmolLM2's file, or gets it
GRPO_STEPS = 20
COMPARED = 5  # first and last steps of GRPO


def measure(
    path: str | os.PathLike, hardware: Hardware | None = None, *, folder: str = FOLDER, at_once: int | None = None
) -> Measurements:
    """Train and evaluate all RUNS, and go on with GRPO from the last one.

    Args:
        path: The JSON file.
        hardware: What `probe()` returned.
        folder: Holds SmolLM2's GGUF file, or gets it.
        at_once: Runs side by side, each in a process of its own; 1: one after the other in this process. By default as
            many as the GPU has GIB_PER_RUN for. None of them is timed.

    Returns:
        Metrics "tool_calling" (the shares in SHOWN with their 95 % intervals, and before the training) and
        "tool_calling_reward" (mean of GRPO's last COMPARED steps, and of its first).

    Raises:
        OSError: SmolLM2 cannot be had.
    """
    hardware = hardware or probe(measure=False)
    found = Measurements(path, hardware)
    at_once = at_once or max(1, min(len(RUNS), int((hardware.memory_gib or 0) // GIB_PER_RUN)))
    settings = [(run, hardware, folder, run == [*RUNS][-1]) for run in RUNS]
    if at_once == 1:
        for setting in settings:
            _keep(found, trained(*setting))
        return found
    checkpoint(folder)  # made once, before the processes look for it
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(at_once, mp_context=context) as pool:
        runs = [pool.submit(trained, *setting) for setting in settings]
        for done in as_completed(runs):
            if done.exception() is None:
                _keep(found, done.result())
    for run in runs:
        run.result()  # raises the error of the first that failed, after the others are kept
    return found


class Trained(NamedTuple):
    """What came of a run: shares by name before and after its training and GRPO, and the rewards of GRPO's steps."""

    run: str
    before: Mapping[str, Share]
    after: Mapping[str, Share]
    after_grpo: Mapping[str, Share] | None
    rewards: list[float]


def trained(run: str, hardware: Hardware, folder: str, with_grpo: bool) -> Trained:
    """Train and evaluate one of the RUNS, and go on with GRPO if asked to."""
    free_memory()
    given, questions = RUNS[run], test_questions()
    dtype = _dtype(hardware, given["four_bit"])
    model, tokenizer, source = load(folder, device=hardware.device, dtype=dtype, four_bit=given["four_bit"])
    print(f"{run}: {source}", flush=True)
    before, _ = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
    model, _ = fine_tune(model, tokenizer, seed=given["seed"])
    after, done = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
    print("\n".join([f"{run}: exact calls {after['exact call']}", *wrong(questions, done)]), flush=True)
    if not with_grpo:
        return Trained(run, before, after, None, [])
    half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    rewards = [step["reward"] for step in grpo.train(model, tokenizer, steps=GRPO_STEPS, **half)]
    again, _ = evaluate(merged(model), tokenizer, questions, batch_size=len(questions))
    return Trained(run, before, after, again, rewards)


def _dtype(hardware: Hardware, four_bit: bool) -> torch.dtype:
    """In NF4 that of the notebook on every GPU."""
    if hardware.device == "cpu":
        return torch.float32
    return torch.bfloat16 if hardware.bf16 and not four_bit else torch.float16


def _keep(found: Measurements, done: Trained) -> None:
    _add(found, done.run, done.before, done.after)
    if done.after_grpo is not None:
        case = f"{done.run}, then {GRPO_STEPS} steps of GRPO"
        _add(found, case, done.after, done.after_grpo)
        first, last = (statistics.mean(steps) for steps in (done.rewards[:COMPARED], done.rewards[-COMPARED:]))
        compared = {f"first {COMPARED} steps": first}
        found.add("tool_calling_reward", f"{case}, last {COMPARED}", last, "reward", baselines=compared)
    found.save()


def _add(found: Measurements, case: str, before: Mapping[str, Share], after: Mapping[str, Share]) -> None:
    for name in SHOWN:
        if name in after:
            share = after[name]
            baselines = {"before": before[name].value} if name in before else None
            found.add("tool_calling", f"{name}, {case}", share.value, "fraction", *share.interval, baselines=baselines)


if __name__ == "__main__":
    run_sweep(measure, "Tool calling over seeds, in 16 bits, and with GRPO.")
