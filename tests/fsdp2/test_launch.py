"""A launch by addresses reads the parts of the stream at hand, wherever it lies, and is prepared once a layout."""

import ctypes

import pytest
import torch
from torch import nn

from tests.fsdp2.models import layer
from unsloth_puzzles.fsdp2 import launch
from unsloth_puzzles.fsdp2.launch import dequantize_stream
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.stream import stream_of


class Recorded:
    """A launch that keeps the addresses it is given."""

    def __init__(self):
        self.prepared, self.addresses = [], []

    def prepare(self, weight):
        self.prepared.append(weight)
        return self

    def run(self, addresses):
        self.addresses.append(addresses)


@pytest.fixture
def recorded(monkeypatch):
    found = Recorded()
    monkeypatch.setattr(launch, "prepare", found.prepare)
    monkeypatch.setattr(launch, "_prepared", {})
    return found


def packed_layer(**options):
    model = nn.Sequential(layer(**options))
    pack_nf4(model, 2)
    return model[0]


def arguments(packed):
    return packed.code, packed.code2, packed.offset, packed.layout


def at(address: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes at an address, as many as `like` has."""
    return torch.frombuffer(bytearray(ctypes.string_at(address, like.nbytes)), dtype=torch.uint8)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("options", [{}, {"nested": False}, {"blocksize": 128}, {"rows": 64, "columns": 320}])
def test_the_addresses_are_those_of_the_stream_at_hand(recorded, options):
    packed = packed_layer(**options)
    for weight in (packed.weight, (255 - stream_of(packed.weight)).view(torch.float16)):  # other bytes elsewhere
        dequantize_stream(weight, *arguments(packed), torch.float16)
        parts = packed.layout.split(stream_of(weight))
        found = recorded.addresses[-1]
        for address, part in zip((found[0], found[1], found[4]), parts, strict=True):
            assert part is None or torch.equal(at(address, part), as_bytes(part))
        for address, table in zip((found[2], found[3], found[5]), arguments(packed)[:3], strict=True):
            assert table is None or torch.equal(at(address, table), as_bytes(table))
        assert all(found)
    assert len(recorded.prepared) == 1


def test_other_layouts_dtypes_and_alignments_are_prepared_anew(recorded):
    first, second = packed_layer(), packed_layer(rows=64, columns=320)
    for dtype in (torch.float16, torch.bfloat16):
        for packed in (first, second):
            dequantize_stream(packed.weight, *arguments(packed), dtype)
    stream = stream_of(first.weight)
    buffer = torch.empty(len(stream) + 32, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + 4  # an address of no whole 16 bytes
    moved = buffer[start : start + len(stream)].copy_(stream).view(torch.float16)
    dequantize_stream(moved, *arguments(first), torch.float16)
    assert [(tuple(one.shape), one.dtype, one.packed.data_ptr() % 16) for one in recorded.prepared] == [
        (first.layout.shape, torch.float16, 0), (second.layout.shape, torch.float16, 0),
        (first.layout.shape, torch.bfloat16, 0), (second.layout.shape, torch.bfloat16, 0),
        (first.layout.shape, torch.float16, 4),
    ]  # fmt: skip


def test_a_share_and_freed_memory_are_refused(recorded):
    packed = packed_layer()
    whole = stream_of(packed.weight).clone().view(torch.float16)
    for weight, found in ((whole[: len(whole) // 2], f"{len(whole)} bytes"), (whole, "freed memory")):
        if found == "freed memory":
            whole.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"^weight must be a whole stream of \d+ bytes, got {found}; gather it"):
            dequantize_stream(weight, *arguments(packed), torch.float16)
    assert not recorded.addresses
