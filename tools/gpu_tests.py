"""Run the gpu-marked tests and keep their record in resources/measurements/gpu_tests.json: `python -m tools.gpu_tests`.

It refuses to run without a GPU, where every one of them would be a skip.
"""

import os
import subprocess
import sys

import torch

from tools.build_notebook import ROOT

GIB_PER_WORKER, MOST_WORKERS = 16, 8  # most tests wait for a compiler, and none needs more memory than a T4 has


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu-test needs a CUDA GPU, and torch sees none; nothing was run or written.", file=sys.stderr)
        return 1
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    workers = min(MOST_WORKERS, os.cpu_count() or 1, int(memory_gib // GIB_PER_WORKER))
    command = [sys.executable, "-m", "pytest", "-p", "tools.record_tests", "-m", "gpu", "--durations=30"]
    command += ["-n", str(workers)] if workers > 1 else []
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
