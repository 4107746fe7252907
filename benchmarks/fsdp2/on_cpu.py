"""The training script on CPUs, where accelerate ignores FSDP2, and Triton's interpreter would take seconds a step.

python -m benchmarks.fsdp2.on_cpu FLAGS            one process; torchrun starts several
"""

import os
import sys

import torch

from benchmarks.fsdp2 import (
    accelerate_on_cpu,  # noqa: F401  (patches accelerate)
    formula,
)
from unsloth_puzzles.fsdp2 import linear
from unsloth_puzzles.fsdp2.train import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    linear._OPS = formula.OPERATORS
    main()
    if "WORLD_SIZE" in os.environ:  # a thread of gloo that frees its last tensor while Python ends aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
