"""`unsloth_puzzles.fsdp2.train` where accelerate uses FSDP2 on CPUs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import accelerate_on_cpu  # noqa: F401
import torch

from unsloth_puzzles.fsdp2.train import main

torch.set_num_threads(1)
main()
