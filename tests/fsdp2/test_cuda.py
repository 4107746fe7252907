"""What only a GPU shows: 16-bit storage loses bytes in FSDP2's copies, and the byte stream does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, kept", [(torch.float16, False), (torch.bfloat16, False), (torch.uint8, True)])
def test_foreach_copy_changes_nan_patterns_of_16_bit_floats(dtype, kept):
    """The cause of the corruption: this operator of PyTorch copies 16-bit floats by way of float32 on CUDA."""
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda").view(dtype)
    target = torch.empty_like(source)
    torch._foreach_copy_([target], [source])
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8)) == kept


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    out = tmp_path_factory.mktemp("bytes") / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("bytes_on_gpu.py")), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", ["byte stream", "byte stream, float16 policy", "byte stream, offloaded"])
def test_a_byte_stream_arrives_unchanged_on_both_ranks(changed, case):
    assert [rank[case] for rank in changed] == [0, 0]


def test_float16_storage_is_corrupted_on_both_ranks(changed):
    assert all(rank["float16 storage, float16 policy"] > 0 for rank in changed)
