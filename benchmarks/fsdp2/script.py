"""The training script in one process and in two: the same rows in the same order, and what its log says."""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.fsdp2.ranks import start_ranks
from benchmarks.fsdp2.steps import shaped_config
from benchmarks.models import hub_refuses, tiny_llama_config

SCRIPT, ON_CPU = "unsloth_puzzles.fsdp2.train", "benchmarks.fsdp2.on_cpu"
MODEL = "unsloth/Meta-Llama-3.1-8B-bnb-4bit"
DISK_GB = 7  # the checkpoint has 5.7
LAYERS = 4  # of the architecture, where the checkpoint is not available
STEPS, LENGTH = 60, 512
ONE, REGROUPED, TWO = "one GPU, 2 rows", "one GPU, 2 x 1 rows", "two GPUs, 1 row each"
RUNS = {  # flags
    ONE: ("--rows", "2"),
    REGROUPED: ("--rows", "1", "--accumulate", "2"),
    TWO: ("--rows", "2"),
}
TINY = ("--layers", "2", "--steps", "3", "--rows", "2", "--length", "20", "--dtype", "float32", "--no-compile")
ON_ONE = ("--dequantize", "bitsandbytes")  # of the tiny run in one process: bitsandbytes' own layers
SHOWN = 30  # steps from one line of progress to the next


def choose_model(folder: str) -> tuple[str, tuple[str, ...], str, str]:
    """Choose the script's model: the checkpoint, or the architecture with random weights.

    Args:
        folder: Where configuration and tokenizer of the architecture are written.

    Returns:
        The model's name, flags of the script, what kind of weights these are, and a text that says why.
    """
    reason = hub_refuses()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if not reason and free_gb >= DISK_GB:
        return MODEL, (), "real weights", f"{MODEL}, real weights"
    because = reason or f"{free_gb:.1f} GB of disk are free, and the checkpoint needs {DISK_GB}"
    path, flags, kind, source = random_model(folder, LAYERS)
    return path, flags, kind, f"{source} ({because})"


def random_model(folder: str, layers: int) -> tuple[str, tuple[str, ...], str, str]:
    """The architecture of MODEL with random weights and `layers` layers; returns the same as `choose_model`."""
    path = Path(folder, "llama-3.1-8b")
    shaped_config("Llama 3.1 8B", layers, 128256).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    kind = f"{layers} layers, random weights"
    return str(path), ("--layers", str(layers)), kind, f"Llama 3.1 8B, {kind}"


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
        "losses" and gradient "norms" of the steps; of the second half of them the median "seconds" and "tokens_per_s";
        the largest "peak_gib" of each GPU, None without; and "share" of the 4-bit bytes that a rank holds,
        "compilations", "graph_breaks".
    """
    given = ("--model", model, "--steps", str(STEPS), "--length", str(LENGTH), *RUNS[name], *flags)
    return _run(name, SCRIPT, given, len(gpus.split(",")), folder, timeout, {"gpus": gpus})


def run_uncompiled(kernel: str, model: str, *flags: str, folder: str, timeout: float = 900) -> dict:
    """Train on the process's first GPU without compilation.

    Args:
        kernel: "ours" or "bitsandbytes", that de-quantises.
        model: A name or a folder.
        flags: More of the script's.
        folder: As for `run`.
        timeout: As for `run`.

    Returns:
        What `run` returns.
    """
    given = ("--model", model, "--no-compile", "--dequantize", kernel, *flags)
    return _run(kernel, SCRIPT, given, 1, folder, timeout, {})


def tiny_model(folder: str) -> str:
    """A folder with configuration and tokenizer of a tiny Llama."""
    path, tokenizer = Path(folder, "tiny-llama"), tiny_tokenizer()
    tiny_llama_config(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run_tiny(name: str, model: str, *, ranks: int, gpus: str | None, folder: str, timeout: float = 900) -> dict:
    """Train the model of `tiny_model` for the steps of TINY, in one process with bitsandbytes' own layers.

    Args:
        name: Of the run.
        model: The folder.
        ranks: 1 for a plain process.
        gpus: One for each rank; None runs it on the CPU.
        folder: As for `run`.
        timeout: As for `run`.

    Returns:
        What `run` returns.
    """
    given = ("--model", model, *TINY, *(ON_ONE if ranks == 1 else ()))
    options = {"gpus": "", "TRITON_INTERPRET": "1"} if gpus is None else {"gpus": gpus}
    return _run(name, ON_CPU if gpus is None else SCRIPT, given, ranks, folder, timeout, options)


def differences(a: dict, b: dict) -> tuple[list[float], list[float]]:
    """Of two runs the differences by step: of losses, absolute, and of norms, relative to the second's.

    A step that a GradScaler skips has no finite norm. Norms differ by 0 where both runs skip it, by infinity where one
    does.
    """
    losses = [abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)]
    norms = [_relative(x, y) for x, y in zip(a["norms"], b["norms"], strict=True)]
    return losses, norms


def _relative(x: float, y: float) -> float:
    if math.isfinite(x) and math.isfinite(y):
        return abs(x - y) / y
    return math.inf if math.isfinite(x) or math.isfinite(y) else 0.0


def _run(
    name: str, module: str, given: tuple[str, ...], ranks: int, folder: str, timeout: float, options: dict[str, str]
) -> dict:
    file = name.replace(" ", "_").replace(",", "")
    log, summary = Path(folder, f"{file}.jsonl"), Path(folder, f"{file}.json")
    log.unlink(missing_ok=True)
    given += ("--log-file", str(log), "--summary-file", str(summary))
    start_ranks(module, *given, ranks=ranks, timeout=timeout, show=_some_lines(name), **options)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    late = steps[len(steps) // 2 :]
    return {
        "losses": [line["loss"] for line in steps],
        "norms": [line["grad_norm"] for line in steps],
        "seconds": statistics.median(line["seconds"] for line in late),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in late),
        "peak_gib": [_max(peaks) for peaks in zip(*(line["peak_gib"] for line in steps), strict=True)],
        **json.loads(summary.read_text()),
    }


def _max(peaks: tuple[float | None, ...]) -> float | None:
    return None if None in peaks else max(peaks)


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
