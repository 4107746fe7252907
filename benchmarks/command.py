"""The command line of a sweep: python -m benchmarks.FOLDER.sweeps resources/measurements/FILE.json"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from unsloth_puzzles.bench.hardware import Hardware, probe
from unsloth_puzzles.bench.record import Measurements


def run_sweep(measure: Callable[[Path, Hardware], Measurements], description: str) -> None:
    """Measure into the file that the command line names, and print the records; without a GPU, exit with an error.

    Args:
        measure: What makes and saves the measurements.
        description: Of the sweep, for `--help`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("path", type=Path, help="the JSON file to write")
    path = parser.parse_args().path
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU, and these times are a GPU's")
    for record in measure(path, probe()).records:
        print(f"{record['metric']}, {record['case']}: {record['value']:.4g} {record['unit']} {record['baselines']}")
