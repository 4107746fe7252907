"""Losses of the first steps of a classifier of docstrings, in NF4 and float32, for each way of training.

python -m benchmarks.classification.losses MODEL --way compiled --out losses.json    what `losses_apart` starts
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.classification.docstrings import Docstrings, docstrings
from benchmarks.classification.training import BATCH_SIZE, WAYS, train
from unsloth_puzzles.bench import child

TIMEOUT = 600.0


def losses_of(
    name: str | Path, data: Docstrings, way: str, *, steps: int, batch_size: int = BATCH_SIZE, device: str | None = None
) -> torch.Tensor:
    """Train some steps in NF4 and float32, always with the same seed.

    Args:
        name: A folder or a name on the hub of a causal LM.
        data: Texts and labels.
        way: One of `WAYS`.
        steps: Their number.
        batch_size: Texts a step.
        device: None is the GPU, or the CPU.

    Returns:
        [steps] float64, in nats: the loss of each step.
    """
    few = dataclasses.replace(data, test=data.test[:16])  # their scores are not looked at
    settings = {"steps": steps, "batch_size": batch_size, "dtype": torch.float32, "device": device, "reload": False}
    run = train(name, few, way=way, **settings)
    return torch.tensor(run.losses, dtype=torch.float64)


def losses_apart(name: str | Path, way: str, *, steps: int, batch_size: int, timeout: float = TIMEOUT) -> torch.Tensor:
    """As `losses_of` on the standard library's docstrings, silently and in a process of its own.

    Raises:
        ChildError: The process failed, or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "losses.json")
        options = ("--way", way, "--steps", str(steps), "--batch-size", str(batch_size), "--out", str(out))
        child.run("benchmarks.classification.losses", str(name), *options, timeout=timeout, show=None)
        return torch.tensor(json.loads(out.read_text()), dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description="The losses of some steps are written as JSON.")
    parser.add_argument("model")
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    settings = {"steps": given.steps, "batch_size": given.batch_size}
    losses = losses_of(given.model, docstrings(), given.way, **settings)
    given.out.write_text(json.dumps(losses.tolist()))


if __name__ == "__main__":
    main()
