"""Runs of the training script on a CPU: alone, or by torchrun in one rank or more."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_on_cpu.py")
TIMEOUT = 300  # seconds, after which a run counts as one that hangs


def run(model: Path, log: Path, *flags: object, **options: object) -> list[dict]:
    """The lines of the log of a run that must not fail; see `start`."""
    done = start(model, log, *flags, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return lines_of(log)


def start(
    model: Path, log: Path, *flags: object, ranks: int | None = None, layers: int | None = 2, callback: str = ""
) -> subprocess.CompletedProcess:
    """A run on two rows of 20 tokens a step, to its end.

    Args:
        model: A folder.
        log: The log file.
        flags: More flags of the script.
        ranks: Of torchrun; None runs the script without it.
        layers: Of a model with random weights; None loads those in the folder.
        callback: A class in `callbacks.py` whose instance the trainer gets. It may write to the folder of the log.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks) if ranks else ()
    random = ("--layers", layers) if layers else ()
    settings = ("--model", model, *random, "--rows", 2, "--length", 20, "--no-compile", "--log-file", log)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CALLBACK": callback,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *map(str, (*launcher, SCRIPT, *settings, *flags))],
        env=environment, cwd=log.parent, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def lines_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def losses(lines: list[dict]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines]
