"""The three launches: what bitsandbytes' C functions are given, and how little the host does around them."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.nf4 import baselines
from benchmarks.nf4.workload import make_layer

SHAPE = (8, 256)  # 32 blocks, one second-level scale


@pytest.fixture
def c_functions(monkeypatch):
    """bitsandbytes' C functions as Python callbacks that read and write the CPU's memory at the addresses given."""
    import bitsandbytes.functional

    def at(address, count, dtype):
        size = count * torch.empty(0, dtype=dtype).element_size()
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)

    def absmax(code, q, absmax2, out, blocksize, count, stream):
        second = at(absmax2, -(-count // blocksize), torch.float32).repeat_interleave(blocksize)[:count]
        at(out, count, torch.float32).copy_(at(code, 256, torch.float32)[at(q, count, torch.uint8).int()] * second)

    def weights(dtype):
        def run(code, packed, absmax, out, blocksize, count, stream):
            assert code is None  # the NF4 table is in the kernel
            data = at(packed, count // 2, torch.uint8).int()
            codes = table[torch.stack([data >> 4, data & 15], 1).flatten()]
            scales = at(absmax, -(-count // blocksize), torch.float32).repeat_interleave(blocksize)[:count]
            at(out, count, dtype).copy_(codes * scales)

        return run

    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    prototype = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer, number, number, pointer)
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    found = {f"cdequantize_blockwise_{kind}_nf4": prototype(weights(dtype)) for kind, dtype in kinds.items()}
    found["cdequantize_blockwise_fp32"] = prototype(absmax)
    monkeypatch.setattr(bitsandbytes.functional, "lib", SimpleNamespace(**found))
    monkeypatch.setattr(baselines, "_current_device", lambda: -1)  # what a CPU tensor's get_device() is
    monkeypatch.setattr(baselines, "_current_stream", int)
    baselines._c_functions.cache_clear()
    yield
    baselines._c_functions.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_three_launches_give_the_weights(c_functions, dtype):
    layer = make_layer(*SHAPE, dtype, "cpu")
    state = layer.weight.quant_state
    absmax = state.state2.code[state.absmax.int()] * state.state2.absmax.repeat_interleave(256)[:32] + state.offset
    data = layer.weight.data.flatten().int()
    codes = state.code[torch.stack([data >> 4, data & 15], 1).flatten()]
    expected = (codes * absmax.repeat_interleave(64)).to(dtype).view(SHAPE)
    assert torch.equal(baselines.three_launches(layer), expected)


def test_the_host_makes_few_calls(monkeypatch):
    """As Unsloth's own code: no look-up of a function by its name and no switch of the device, call by call."""
    getpid = ctypes.CDLL(None).getpid
    functions = dict.fromkeys(("absmax", torch.float16, torch.bfloat16, torch.float32), getpid)
    for name, replacement in {
        "_c_functions": functions.copy, "_current_device": (-1).__int__, "_current_stream": int
    }.items():  # fmt: skip
        monkeypatch.setattr(baselines, name, replacement)
    layer = make_layer(*SHAPE, torch.float16, "cpu")
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    baselines.three_launches(layer)
    sys.setprofile(None)
    assert called == ["three_launches", "__getattr__", "__torch_function__"]  # layer.weight, and its .data


@pytest.mark.gpu
def test_the_three_launches_are_bitsandbytes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = make_layer(129, 1024, dtype, "cuda")
        assert torch.equal(baselines.three_launches(layer), baselines.bitsandbytes_dequantize(layer))
