"""`unsloth_puzzles.fsdp2.train` where accelerate uses FSDP2 on CPUs, with a callback of the tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import callbacks
import torch

from benchmarks.fsdp2 import accelerate_on_cpu  # noqa: F401  (patches accelerate)
from unsloth_puzzles.fsdp2.train import main

torch.set_num_threads(1)
if rank := os.environ.get("RANK"):  # Inductor may load a library that another rank is still writing
    os.environ["TORCHINDUCTOR_CACHE_DIR"] += f"/rank_{rank}"  # of the folder that conftest.py makes
chosen = os.environ.get("CALLBACK")
main(callbacks=[getattr(callbacks, chosen)()] if chosen else [])
if rank:  # a thread of gloo that frees a tensor while Python ends aborts the process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
