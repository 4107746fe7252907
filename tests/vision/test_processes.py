"""With two processes, of which one has images and the other none, the gradients are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_adapters_of_the_tower_take_part(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), name], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("DDP") for line in lines) == 2 and sum(line.startswith("FSDP2") for line in lines) == 6
    assert sum(" 0 gradients of the tower" in line for line in lines) == 2, "both, at the step without images"
