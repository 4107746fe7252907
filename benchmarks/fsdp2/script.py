"""The training script on one GPU and on two: the same rows in the same order, and what its log says."""

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.fsdp2.ranks import start_ranks
from benchmarks.fsdp2.steps import shaped_config
from benchmarks.models import hub_refuses

MODEL = "unsloth/Meta-Llama-3.1-8B-bnb-4bit"
DISK_GB = 7  # the checkpoint has 5.7
LAYERS = 4  # of the architecture, where the checkpoint is not to be had
STEPS, LENGTH = 60, 512
ONE, REGROUPED, TWO = "one GPU, 2 rows", "one GPU, 2 x 1 rows", "two GPUs, 1 row each"
RUNS = {  # flags
    ONE: ("--rows", "2"),
    REGROUPED: ("--rows", "1", "--accumulate", "2"),
    TWO: ("--rows", "2"),
}
SHOWN = 20  # steps from one line of progress to the next


def choose_model(folder: str) -> tuple[str, tuple[str, ...], str]:
    """What the script is to train: the checkpoint, or the architecture with random weights.

    Args:
        folder: Where configuration and tokenizer of the architecture are written.

    Returns:
        The model's name, flags of the script, and a text that says which it is and why.
    """
    reason = hub_refuses()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if not reason and free_gb >= DISK_GB:
        return MODEL, (), f"real weights, {MODEL}"
    path = Path(folder, "llama-3.1-8b")
    shaped_config("Llama 3.1 8B", LAYERS, 128256).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    because = reason or f"{free_gb:.1f} GB of disk are free, and the checkpoint needs {DISK_GB}"
    return str(path), ("--layers", str(LAYERS)), f"{LAYERS} layers of Llama 3.1 8B, random weights ({because})"


def run(name: str, model: str, *flags: str, gpus: str, folder: str, timeout: float = 900) -> dict:
    """Train STEPS steps of rows of LENGTH tokens.

    Args:
        name: One of RUNS.
        model: A name or a folder.
        flags: More of the script's.
        gpus: CUDA_VISIBLE_DEVICES, a rank for each.
        folder: For the log and the summary.
        timeout: Seconds.

    Returns:
        "losses" of the steps; of the second half of them the median "seconds" and "tokens_per_s"; the largest
        "peak_gib" of each GPU; and "share" of the 4-bit bytes that a GPU holds, "compilations", "graph_breaks".
    """
    number = list(RUNS).index(name)
    log, summary = Path(folder, f"log_{number}.jsonl"), Path(folder, f"summary_{number}.json")
    log.unlink(missing_ok=True)
    given = ("--model", model, "--steps", str(STEPS), "--length", str(LENGTH), *RUNS[name], *flags)
    given += ("--log-file", str(log), "--summary-file", str(summary))
    ranks = len(gpus.split(","))
    start_ranks(
        "unsloth_puzzles.fsdp2.train", *given, ranks=ranks, timeout=timeout, gpus=gpus, show=_some_lines(name)
    )  # fmt: skip
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    late = steps[len(steps) // 2 :]
    return {
        "losses": [line["loss"] for line in steps],
        "seconds": statistics.median(line["seconds"] for line in late),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in late),
        "peak_gib": [max(peaks) for peaks in zip(*(line["peak_gib"] for line in steps), strict=True)],
        **json.loads(summary.read_text()),
    }


def _some_lines(name: str) -> Callable[[str], None]:
    """Show of a trainer's output each SHOWN-th of the lines that have a loss, and that it is at work."""
    steps = 0

    def show(line: str) -> None:
        nonlocal steps
        if "'loss': " in line:
            steps += 1
            if steps % SHOWN == 0:
                loss = line.partition("'loss': '")[2].partition("'")[0]
                print(f"{name}: step {steps} of {STEPS}, loss {loss}", flush=True)
        elif line.startswith("..."):
            print(f"{name}: {line}", flush=True)

    return show
