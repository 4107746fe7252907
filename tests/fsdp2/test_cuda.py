"""What only a GPU shows: 16-bit storage loses bytes in FSDP2's copies, and the byte stream does not."""

import json

import pytest
import torch

from benchmarks.fsdp2.corruption import CASES, FLOAT16, changed_by_copy
from benchmarks.fsdp2.features import FEATURES, allowed, differences, seen, unseen
from benchmarks.fsdp2.ranks import start_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, kept", [(torch.float16, False), (torch.bfloat16, False), (torch.uint8, True)])
def test_foreach_copy_changes_nan_patterns_of_16_bit_floats(dtype, kept):
    """The cause of the corruption: this operator of PyTorch copies 16-bit floats by way of float32 on CUDA."""
    assert (changed_by_copy(dtype, "cuda") == 0) == kept


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    out = tmp_path_factory.mktemp("bytes") / "out.json"
    start_ranks("benchmarks.fsdp2.corruption", str(out), ranks=2, timeout=300)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", [name for name in CASES if name != FLOAT16])
def test_a_byte_stream_arrives_unchanged_on_both_ranks(changed, case):
    assert changed[case] == [0, 0]


def test_float16_storage_is_corrupted_on_both_ranks(changed):
    assert min(changed[FLOAT16]) > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and two ranks, which may share a GPU, write."""
    found = []
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("features") / "out.json"
        start_ranks("benchmarks.fsdp2.features", str(out), ranks=ranks, timeout=400)
        found.append(json.loads(out.read_text()))
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_features_on_a_gpu(runs, name):
    one, two = runs
    (loss, norm), (most, most_norm) = differences(name, two, one), allowed(name, one)
    assert loss <= most and norm <= most_norm
    assert seen(name, two, one)[1] and unseen(two, one)
    assert two[name]["changed"] == 0 and two[name]["share"] == 0.5 and two[name]["reduced"] == ["torch.float32"]
