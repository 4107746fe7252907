"""Runs pytest in copies of the project, each in a fork of a process that has the slow imports behind it.

    python -P run_mutants.py '[["/copy", ["tests/nf4/test_asm.py"]], ...]'

prints pytest's exit statuses as a JSON list; the output of each run goes to output.txt in its copy. A copy's own
packages are imported after the fork, from the copy.
"""

import json
import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # as in conftest.py

import bitsandbytes  # noqa: F401
import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest
import torch._inductor.compile_fx  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import triton.language  # noqa: F401


def fork_pytest(folder: str, tests: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = pytest.main(["-qx", "--tb=short", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    statuses = [fork_pytest(folder, tests) for folder, tests in json.loads(sys.argv[1])]
    print(json.dumps(statuses))
