"""Two processes against one: losses, gradient norms and bytes, by a plain loop over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("cases.py")
NAMES = ("plain", "offload", "checkpointing", "no resharding", "sharded embeddings", "compiled", "all")


def run(command: list[str], out: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(CASES), "loops", str(out)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run([], tmp_path_factory.mktemp("one") / "out.json")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run(launcher, tmp_path_factory.mktemp("two") / "out.json")


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_norms_match_one_process(one, two, name):
    """In float32 two halves of a batch are summed in another order than the whole."""
    assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=1e-5)
    assert two[name]["norms"] == pytest.approx(one[name]["norms"], rel=1e-4)
    assert min(one[name]["norms"]) > 0.1 and one[name]["losses"][-1] != one[name]["losses"][0]


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_holds_exactly_half_of_the_bytes(two, name):
    assert two[name]["share"] == 0.5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("compiled", "all")])
def test_gathering_changes_no_byte(two, name):
    assert two[name]["compared"] == 14 and two[name]["changed"] == 0
