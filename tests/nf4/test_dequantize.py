"""`launch` and `dequantize_nf4` in Triton's interpreter against the float32 formula, bit for bit."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

import unsloth_puzzles.nf4.launch as launching
from tests.nf4.guarded import FULL_PROGRAM, SMALL, guarded_launch
from tests.nf4.reference import STORAGE, Weight, around_smallest_normal, assert_same_bits, reference
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.state import BLOCKSIZES, nf4_weight

pytestmark = pytest.mark.skipif(
    not launching.INTERPRETED, reason="the interpreter is off where there is a GPU: see test_cuda.py"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(weight: Weight, config=SMALL, **shifts) -> None:
    packed, state = weight.make()
    assert_same_bits(guarded_launch(packed, state, config, **shifts), reference(packed, state).view(state.shape))


@settings(deadline=None, max_examples=40)
@given(
    numel=st.integers(1, 5 * FULL_PROGRAM),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    blocksize2=st.sampled_from((1, 2, 256)),
    nested=st.booleans(),
    storage=st.sampled_from(STORAGE),
    offset=st.sampled_from((0.0, 0.0137, -0.0137, 1e4)),
    shifts=st.sampled_from(((0, 0), (0, 0), (1, 0), (0, 1), (3, 5))),
    seed=st.integers(0, 2**31),
)
def test_fuzzed_weights(shifts, numel, **fields):
    check(Weight(shape=(numel,), **fields), out_shift=shifts[0], packed_shift=shifts[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("numel", [1, 2, FULL_PROGRAM - 1, FULL_PROGRAM, FULL_PROGRAM + 1, 2 * FULL_PROGRAM + 97])
def test_whole_programs_and_odd_tails(numel, nested, dtype):
    check(Weight(shape=(numel,), nested=nested, dtype=dtype))


@pytest.mark.parametrize("out_shift, packed_shift", [(1, 0), (0, 1), (7, 3)])
def test_pointers_off_alignment(out_shift, packed_shift):
    check(Weight(shape=(2 * FULL_PROGRAM,)), out_shift=out_shift, packed_shift=packed_shift)


@pytest.mark.parametrize("shifted", ["packed", "absmax", "code", "code2", "absmax2", "offset", "out"])
def test_kernel_is_built_for_the_alignment_of_every_pointer(shifted, monkeypatch):
    """The interpreter reads whole words anywhere, a GPU does not: the kernel must be built without that assumption."""
    seen, constexprs = [], launching.constexprs
    monkeypatch.setattr(launching, "constexprs", lambda *a, **w: seen.append(w["ALIGNED"]) or constexprs(*a, **w))
    packed, state = Weight(shape=(FULL_PROGRAM,), dtype=torch.float32).make()
    weight, out = nf4_weight(packed, state), torch.empty(FULL_PROGRAM)
    launching.prepare(weight, out, SMALL).run(out)
    tensor = out if shifted == "out" else getattr(weight, shifted)
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = room[1:].copy_(tensor.view(-1)).view(tensor.shape)
    weight, out = (weight, moved) if shifted == "out" else (weight._replace(**{shifted: moved}), out)
    launching.prepare(weight, out, SMALL).run(out)
    assert seen == [True, shifted not in ("packed", "out")]  # the others are gathered a value at a time


@pytest.mark.parametrize("lookup", ["load", "gather", "select"])
@pytest.mark.parametrize("unroll", [1, 2])
def test_every_look_up_and_unrolling(lookup, unroll):
    check(Weight(shape=(4 * FULL_PROGRAM,)), SMALL._replace(lookup=lookup, unroll=unroll))
    check(Weight(shape=(3 * FULL_PROGRAM + 5,)), SMALL._replace(lookup=lookup, unroll=unroll))


def test_second_level_blocks():
    """600 blocks of 32 lie in three blocks of 256: an index that is off by one block is seen."""
    check(Weight(shape=(600 * 32,), blocksize=32), SMALL._replace(words=256))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [3e-38, 1e-40, 1e-45, 1e-7, 6e4, 3e38])
def test_tiny_subnormal_and_huge_absmax(scale, dtype):
    """Products below 2^-126 become zeros that keep their sign; 16-bit outputs under- and overflow as rounding says."""
    check(Weight(shape=(2 * FULL_PROGRAM + 9,), blocksize=32, nested=False, scale=scale, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_around_the_smallest_normal_number(dtype):
    packed, state = around_smallest_normal(dtype)
    actual = guarded_launch(packed, state, SMALL._replace(words=1024))
    assert_same_bits(actual, reference(packed, state))
    assert (actual == 2.0**-126).any() and (actual == 0).any()


@pytest.mark.parametrize("offset", [0.0, 2.0**-126, -(2.0**-130), 1e-3])
def test_subnormal_second_level(offset):
    """Products code2 * absmax2 below 2^-126 vanish; the sum with the offset is not flushed."""
    check(Weight(shape=(FULL_PROGRAM + 9,), blocksize=32, scale=5e-38, offset=offset, dtype=torch.float32))
    check(Weight(shape=(FULL_PROGRAM + 9,), blocksize=32, scale=1e-40, offset=offset, dtype=torch.float32))


def test_infinite_and_nan_absmax():
    packed, state = Weight(shape=(4 * 64,), nested=False, dtype=torch.bfloat16).make()
    state.absmax[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert_same_bits(guarded_launch(packed, state), reference(packed, state))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (2,), (1, 1), (3, 5), (17, 31), (2, 3, 5)])
def test_public_function_keeps_the_shape(shape):
    packed, state = Weight(shape=shape).make()
    if packed.shape[0] == 1 and len(shape) > 2:
        pytest.skip("a transposed row is a matrix")
    assert_same_bits(dequantize_nf4(packed, state), reference(packed, state))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 5), (5, 0), (1, 7), (3, 5), (2, 3, 5)])
def test_strides_of_a_new_tensor_are_those_of_pytorch(shape):
    assert launching._contiguous_strides(shape) == torch.empty(shape).stride()


def test_row_of_packed_weights_comes_out_transposed():
    packed, state = Weight(shape=(6, 10)).make()
    weight = dequantize_nf4(packed.t(), state)
    assert weight.shape == (10, 6)
    assert_same_bits(weight, dequantize_nf4(packed, state).t())
    assert torch.equal(weight, dequantize_4bit(packed.t(), state))


def test_out_is_written_and_returned():
    packed, state = Weight(shape=(33, 21)).make()
    out = torch.full(state.shape, float("nan"), dtype=state.dtype)
    assert dequantize_nf4(packed, state, out=out) is out
    assert_same_bits(out, reference(packed, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # bitsandbytes' CPU result rounds bfloat16 otherwise
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_equals_bitsandbytes_on_the_cpu(dtype, nested, blocksize):
    # Rows of whole blocks: bitsandbytes' CPU kernel scales the others by a neighbour's absmax.
    weight = torch.randn(20, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(dequantize_nf4(packed, state), dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_bitsandbytes_modules_and_parameters(nested, storage):
    layer = bnb.nn.Linear4bit(96, 40, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")
    state = layer.weight.quant_state
    assert layer.weight.dtype == storage and (state.state2 is not None) == nested
    expected = reference(layer.weight.data, state)
    assert_same_bits(dequantize_nf4(layer), expected)
    assert_same_bits(dequantize_nf4(layer.weight), expected)
    assert_same_bits(dequantize_nf4(layer.weight.data, state), expected)
    assert_same_bits(dequantize_nf4(layer, state), expected)


def test_state_on_the_module_alone_is_found():
    """FSDP replaces the Params4bit; bitsandbytes then leaves the state on the module."""
    layer = bnb.nn.Linear4bit(32, 16, quant_type="nf4").to("cpu")
    expected = dequantize_nf4(layer)
    layer.quant_state = layer.weight.quant_state
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert_same_bits(dequantize_nf4(layer), expected)
