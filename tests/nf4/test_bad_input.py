"""Bad input raises a TypeError or ValueError that names the argument, what was given and what is needed."""

import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit

from tests.nf4.reference import Weight
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.build import Config, constexprs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (40, 96)


def weight(dtype=torch.float16, nested=True):
    return Weight(shape=SHAPE, dtype=dtype, nested=nested).make(DEVICE)


def with_state(second=False, nested=True, **fields):
    """A good weight but for `fields` of its state (of its second level, if `second`)."""

    def build():
        packed, state = weight(nested=nested)
        dequantize_nf4(packed, state)  # a state that was good before is checked again
        for name, value in fields.items():
            part = state.state2 if second else state
            setattr(part, name, value(getattr(part, name)) if callable(value) else value)
        return {"weight": packed, "quant_state": state}

    return build


def with_packed(change):
    def build():
        packed, state = weight()
        dequantize_nf4(packed, state)
        return {"weight": change(packed), "quant_state": state}

    return build


def with_out(change, **options):
    def build():
        packed, state = weight(**options)
        return {
            "weight": packed,
            "quant_state": state,
            "out": change(torch.empty(SHAPE, dtype=state.dtype, device=DEVICE)),
        }

    return build


def fp4():
    packed, state = quantize_4bit(torch.randn(SHAPE, device=DEVICE), quant_type="fp4")
    return {"weight": packed, "quant_state": state}


def int8():
    """The state of `Linear8bitLt`, which is no QuantState."""
    return {"weight": weight()[0], "quant_state": bnb.MatmulLtState()}


def blockwise_8bit():
    """The state of `quantize_blockwise`, which is one, but not of 4 bits."""
    packed, state = bnb.functional.quantize_blockwise(torch.randn(SHAPE, device=DEVICE))
    return {"weight": packed, "quant_state": state}


def int8_module():
    return {"weight": bnb.nn.Linear8bitLt(8, 8)}


def not_yet_quantised():
    return {"weight": bnb.nn.Linear4bit(96, 40, quant_type="nf4")}


def dequantised():
    packed, state = weight()
    return {"weight": dequantize_nf4(packed, state), "quant_state": state}


def every_other(tensor):
    return torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device=tensor.device)[..., 0].copy_(tensor)


CASES = {  # name: (builder, error, what the message must name: argument, need, value)
    "fp4 state": (fp4, ValueError, ["quant_state.quant_type", "'nf4'", "'fp4'"]),
    "int8 state": (int8, TypeError, ["quant_state", "QuantState", "MatmulLtState"]),
    "8-bit blockwise state": (blockwise_8bit, (TypeError, ValueError), ["quant_state", "nf4", "None"]),
    "int8 module": (int8_module, ValueError, ["quant_state", "QuantState", "Linear8bitLt"]),
    "state missing": (lambda: {"weight": weight()[0]}, ValueError, ["quant_state", "QuantState", "Tensor"]),
    "module not yet quantised": (not_yet_quantised, ValueError, ["quant_state", "Linear4bit", "device"]),
    "state is a dict": (
        lambda: {"weight": weight()[0], "quant_state": {}},
        TypeError,
        ["quant_state", "QuantState", "dict"],
    ),
    "weight is a list": (lambda: {"weight": [1], "quant_state": weight()[1]}, TypeError, ["weight", "tensor", "list"]),
    "weight is None": (lambda: {"weight": None, "quant_state": weight()[1]}, TypeError, ["weight", "tensor", "None"]),
    "dequantised weight": (dequantised, ValueError, ["weight", "1920", "7680"]),
    "packed truncated": (with_packed(lambda p: p[:-1]), ValueError, ["weight", "1920", "1919"]),
    "packed too long": (with_packed(lambda p: torch.cat((p, p[:1]))), ValueError, ["weight", "1920", "1921"]),
    "packed not contiguous": (with_packed(every_other), ValueError, ["weight", "contiguous", r"\(2, 2\)"]),
    "packed on meta": (with_packed(lambda p: p.to("meta")), ValueError, ["meta"]),
    "turned fp4": (with_state(quant_type="fp4"), ValueError, ["quant_state.quant_type", "'nf4'", "'fp4'"]),
    "weight dtype": (with_state(dtype=torch.float64), TypeError, ["quant_state.dtype", "float16", "float64"]),
    "block size": (with_state(blocksize=48), ValueError, ["quant_state.blocksize", "64", "48"]),
    "block size missing": (with_state(blocksize=None), ValueError, ["quant_state.blocksize", "64", "None"]),
    "block size a float": (with_state(blocksize=64.0), (TypeError, ValueError), ["quant_state.blocksize", "64.0"]),
    "shape missing": (with_state(shape=None), ValueError, ["quant_state.shape", "shape", "None"]),
    "code dtype": (with_state(code=lambda c: c.half()), TypeError, ["quant_state.code", "float32", "float16"]),
    "code on meta": (with_state(code=lambda c: c.to("meta")), ValueError, ["quant_state.code", "device", "meta"]),
    "code short": (with_state(code=lambda c: c[:15]), ValueError, ["quant_state.code", "16", "15"]),
    "code missing": (with_state(code=None), TypeError, ["quant_state.code", "tensor", "NoneType"]),
    "code strided": (with_state(code=every_other), ValueError, ["quant_state.code", "contiguous", r"\(2,\)"]),
    "absmax on meta": (with_state(absmax=lambda a: a.to("meta")), ValueError, ["quant_state.absmax", "device", "meta"]),
    "absmax short": (with_state(absmax=lambda a: a[:-1]), ValueError, ["quant_state.absmax", "60", "59"]),
    "absmax float, nested": (with_state(absmax=lambda a: a.float()), TypeError, ["absmax", "uint8", "float32"]),
    "absmax half, plain": (
        with_state(nested=False, absmax=lambda a: a.half()),
        TypeError,
        ["absmax", "float32", "float16"],
    ),
    "offset missing": (with_state(offset=None), TypeError, ["quant_state.offset", "tensor", "NoneType"]),
    "offset a number": (with_state(offset=0.5), TypeError, ["quant_state.offset", "tensor", "float"]),
    "offset dtype": (with_state(offset=lambda o: o.double()), TypeError, ["offset", "float32", "float64"]),
    "offset on meta": (with_state(offset=lambda o: o.to("meta")), ValueError, ["offset", "device", "meta"]),
    "code2 short": (with_state(True, code=lambda c: c[:16]), ValueError, ["quant_state.state2.code", "256", "16"]),
    "code2 on meta": (with_state(True, code=lambda c: c.to("meta")), ValueError, ["state2.code", "device", "meta"]),
    "absmax2 short": (with_state(True, absmax=lambda a: a[:0]), ValueError, ["state2.absmax", "1", "0"]),
    "absmax2 dtype": (with_state(True, absmax=lambda a: a.half()), TypeError, ["state2.absmax", "float32", "float16"]),
    "block size 2": (with_state(True, blocksize=0), ValueError, ["state2.blocksize", "positive", "0"]),
    "block size 2 missing": (with_state(True, blocksize=None), ValueError, ["state2.blocksize", "positive", "None"]),
    "out a list": (with_out(lambda out: []), TypeError, ["out", "tensor", "list"]),
    "out dtype": (with_out(lambda out: out.float()), TypeError, ["out", "float16", "float32"]),
    "out shape": (with_out(lambda out: out[1:]), ValueError, ["out", r"\(40, 96\)", r"\(39, 96\)"]),
    "out flat": (with_out(lambda out: out.view(-1)), ValueError, ["out", r"\(40, 96\)", r"\(3840,\)"]),
    "out on meta": (with_out(lambda out: out.to("meta")), ValueError, ["out", "device", "meta"]),
    "out transposed": (
        with_out(lambda out: torch.empty(96, 40, dtype=out.dtype, device=DEVICE).t()),
        ValueError,
        ["out", "contiguous", r"\(1, 40\)"],
    ),
    "out requires grad": (with_out(lambda out: out.requires_grad_()), ValueError, ["out", "gradients"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message_names_argument_need_and_value(name):
    build, error, words = CASES[name]
    arguments = build()
    with pytest.raises(error) as caught:
        dequantize_nf4(**arguments)
    for word in words:
        assert re.search(word, str(caught.value)), f"no {word!r} in: {caught.value}"


def test_weights_of_the_bad_input_cases_are_valid_unchanged():
    """Without this, every case above could fail for another reason."""
    for nested in (True, False):
        packed, state = weight(nested=nested)
        assert dequantize_nf4(packed, state, out=torch.empty(SHAPE, dtype=state.dtype, device=DEVICE)).shape == SHAPE
    assert isinstance(with_state()()["quant_state"], QuantState)


def test_cpu_tensors_without_the_interpreter_are_refused():
    """Triton compiles for GPUs alone: the message says how the interpreter is switched on, the op's likewise."""
    script = """
import torch
from tests.nf4.reference import Weight
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.state import nf4_weight
packed, state = Weight(shape=(4, 16)).make("cpu")
op = torch.ops.unsloth_puzzles.dequantize_nf4
for call in (lambda: dequantize_nf4(packed, state), lambda: op(*nf4_weight(packed, state))):
    try:
        call()
    except ValueError as error:
        print("ValueError:", error)
"""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ValueError: weight must be ")]
    assert len(lines) == 2, done.stdout
    for line in lines:
        assert "CUDA" in line and "cpu" in line and "TRITON_INTERPRET=1" in line


def test_moved_state_frees_its_old_tensors():
    """What is remembered of a good state must not keep the GPU's memory when the state goes to the CPU."""
    packed, state = weight()
    dequantize_nf4(packed, state)
    old = [weakref.ref(tensor) for tensor in (state.absmax, state.state2.absmax, state.offset)]
    state.absmax, state.offset = state.absmax.clone(), state.offset.clone()
    state.state2.absmax = state.state2.absmax.clone()
    gc.collect()
    assert [tensor() for tensor in old] == [None, None, None]


def test_deleted_state_frees_its_tensors():
    packed, state = weight()
    dequantize_nf4(packed, state)
    old = [weakref.ref(tensor) for tensor in (packed, state.absmax, state.state2.absmax)]
    del packed, state
    gc.collect()
    assert [tensor() for tensor in old] == [None, None, None]


@pytest.mark.parametrize("shape", [4096, (64.0, 64.0), (-64, -64), None])
def test_invalid_shapes_are_refused(shape):
    packed, state = Weight(shape=(64, 64)).make(DEVICE)
    state.shape = shape
    with pytest.raises(ValueError, match=r"quant_state.shape must be a tuple of integers.* got "):
        dequantize_nf4(packed, state)


def test_packed_row_of_a_3d_weight_is_refused():
    packed, state = Weight(shape=(4, 8, 16)).make(DEVICE)
    with pytest.raises(ValueError, match=r"weight must be packed data \[n, 1\]"):
        dequantize_nf4(packed.view(1, -1), state)


def test_freed_memory_is_refused():
    packed, state = Weight(shape=(64, 64)).make(DEVICE)
    kept = packed.clone()
    packed.untyped_storage().resize_(0)
    assert kept.numel() == packed.numel()
    with pytest.raises(ValueError, match="weight must have allocated memory"):
        dequantize_nf4(packed, state)


def test_words_must_fit_the_warps_of_a_shuffle():
    with pytest.raises(ValueError, match=r"config.words must be 32 or 64 x num_warps"):
        constexprs(Config(words=512, num_warps=4), torch.float16, 64, 256, 90, NESTED=True, FULL=True, ALIGNED=True)
