"""What only a GPU shows: 16-bit storage loses bytes in FSDP2's copies, and the byte stream does not."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from benchmarks.fsdp2.corruption import CASES, FLOAT16, changed_by_copy
from benchmarks.fsdp2.features import FEATURES, allowed, differences, seen, unseen
from benchmarks.fsdp2.ranks import start_ranks
from tests.fsdp2.models import layer
from unsloth_puzzles.fsdp2.launch import dequantize_stream
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.stream import stream_of

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


def test_ranks_that_share_a_gpu_save_adapters(tmp_path):
    start_ranks("tests.fsdp2.save_on_gpu", str(tmp_path), ranks=2, timeout=300)
    assert (tmp_path / "adapter_model.safetensors").exists()


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


@pytest.mark.parametrize(
    "options", [{}, {"nested": False}, {"blocksize": 256, "bias": True}, {"rows": 3, "columns": 5}]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uncompiled_packed_layers_have_the_bits_of_bitsandbytes_at_any_address(options, dtype):
    """One prepared launch serves all addresses; an address of no whole 16 bytes needs another."""
    torch.manual_seed(4)
    plain = layer(**options).cuda()
    state, packed = plain.weight.quant_state, plain.weight.data
    expected = dequantize_4bit(packed, state).to(dtype)
    model = nn.Sequential(plain)
    pack_nf4(model, 2)
    stream = stream_of(plain.weight)
    buffer = torch.empty(3 * len(stream) + 64, dtype=torch.uint8, device="cuda")
    for start in (0, len(stream) + 16, 2 * len(stream) + 36):
        weight = buffer[start : start + len(stream)].copy_(stream).view(torch.float16)
        found = dequantize_stream(weight, plain.code, plain.code2, plain.offset, plain.layout, dtype)
        assert torch.equal(found, expected)
