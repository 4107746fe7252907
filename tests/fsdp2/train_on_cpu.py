"""`unsloth_puzzles.fsdp2.train` where accelerate uses FSDP2 on CPUs, with a callback of the tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import accelerate_on_cpu  # noqa: F401
import callbacks
import torch

from unsloth_puzzles.fsdp2.train import main

torch.set_num_threads(1)
chosen = os.environ.get("CALLBACK")
main(callbacks=[getattr(callbacks, chosen)()] if chosen else [])
