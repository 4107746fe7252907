"""A launch that is remembered between two calls must not outlive what it was prepared from."""

import gc
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests.nf4.reference import Weight, assert_same_bits
from unsloth_puzzles.nf4 import cache, dequantize_nf4
from unsloth_puzzles.nf4.cache import is_remembered, recall, remember
from unsloth_puzzles.nf4.launch import Launch
from unsloth_puzzles.nf4.state import nf4_weight

needs_gpu = pytest.mark.gpu


def remembered(**changes):
    """A weight de-quantised once, so that its launch is remembered."""
    packed, state = Weight(shape=(64, 512), **changes).make("cuda")
    first = dequantize_nf4(packed, state)
    assert is_remembered(state)
    return packed, state, first


@needs_gpu
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_second_call_runs_the_remembered_launch(dtype, storage, monkeypatch):
    packed, state, first = remembered(dtype=dtype, storage=storage)
    monkeypatch.setattr("unsloth_puzzles.nf4.dequantize.check", None)  # not called any more
    second = dequantize_nf4(packed, state)
    assert second.data_ptr() != first.data_ptr()
    assert_same_bits(second, first)


def _swap_data(state):
    state.absmax.data = state.absmax.flip(0)


CHANGES = {
    "dtype": lambda state: setattr(state, "dtype", torch.bfloat16),
    "shape": lambda state: setattr(state, "shape", torch.Size((512, 64))),
    "absmax": lambda state: setattr(state, "absmax", state.absmax.flip(0)),
    "absmax data": _swap_data,
    "offset": lambda state: setattr(state, "offset", state.offset * 3),
    "absmax2": lambda state: setattr(state.state2, "absmax", state.state2.absmax * 2),
    "code2": lambda state: setattr(state.state2, "code", state.state2.code.flip(0)),
    "absmax, in place": lambda state: state.absmax.add_(1),
}


@needs_gpu
@pytest.mark.parametrize("change", CHANGES)
def test_changed_state_is_prepared_again(change):
    packed, state, _ = remembered()
    CHANGES[change](state)
    for _ in range(2):
        assert_same_bits(dequantize_nf4(packed, state), dequantize_4bit(packed, state))


@needs_gpu
def test_another_packed_tensor_is_prepared_again():
    packed, state, first = remembered()
    other = packed.flip(0).contiguous()
    assert_same_bits(dequantize_nf4(other, state), dequantize_4bit(other, state))
    assert not torch.equal(dequantize_nf4(other, state), first)
    with pytest.raises(ValueError, match="weight must be 16384 packed bytes"):
        dequantize_nf4(packed[:-8], state)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_nf4(torch.stack([packed, packed], -1)[..., 0], state)


@needs_gpu
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("quant_type", "fp4", ValueError), ("blocksize", 48, ValueError), ("code", None, TypeError)],
)
def test_state_that_becomes_invalid_is_refused(name, value, error):
    packed, state, _ = remembered()
    setattr(state, name, value)
    with pytest.raises(error, match=name):
        dequantize_nf4(packed, state)


@needs_gpu
def test_cache_keeps_no_tensor_alive():
    packed, state, _ = remembered()
    absmax, known = weakref.ref(state.absmax), len(cache._known)
    state.absmax = state.absmax.clone()
    gc.collect()
    assert absmax() is None and not is_remembered(state)
    dequantize_nf4(packed, state)
    assert is_remembered(state) and len(cache._known) == known
    del state
    gc.collect()
    assert len(cache._known) == known - 1


@needs_gpu
def test_remembered_launch_follows_the_stream_and_graph_capture():
    packed, state, first = remembered()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        second = dequantize_nf4(packed, state)
    stream.synchronize()
    assert_same_bits(second, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dequantize_nf4(packed, state)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, first)


@needs_gpu
def test_plain_absmax_is_not_remembered():
    packed, state = Weight(shape=(64, 512), nested=False).make("cuda")
    assert_same_bits(dequantize_nf4(packed, state), dequantize_4bit(packed, state))
    assert not is_remembered(state)


# ------------------------------------------------------------------------------------------- without a GPU


def remembered_stub(dtype=None):
    """A weight on the CPU for which a launch is remembered that was never compiled."""
    packed, state = Weight(shape=(64, 512)).make("cpu")
    weight = nf4_weight(packed, state, dtype)
    addresses = tuple(tensor.data_ptr() for tensor in weight[:6])
    launch = Launch(None, 1, (), (), addresses, 64 * 512, (64, 512), (512, 1), weight.dtype, 0)
    remember(launch, packed, state)
    assert is_remembered(state)
    return packed, state, launch


SPOILED = {
    "quant_type": lambda state: setattr(state, "quant_type", "fp4"),
    "blocksize": lambda state: setattr(state, "blocksize", 128),
    "blocksize2": lambda state: setattr(state.state2, "blocksize", 128),
    "no code": lambda state: setattr(state, "code", None),
    "no second level": lambda state: setattr(state, "state2", None),
    "offset is a number": lambda state: setattr(state, "offset", 0.5),
}


def test_recall_finds_an_unchanged_weight_and_other_views_of_it():
    packed, state, launch = remembered_stub()
    assert recall(packed, state) is recall(packed.view(-1, 1), state) is recall(packed, state, state.dtype) is launch


@pytest.mark.parametrize("change", [*(name for name in CHANGES if name != "absmax, in place"), *SPOILED])
def test_recall_refuses_a_changed_state(change):
    packed, state, _ = remembered_stub()
    (CHANGES | SPOILED)[change](state)
    assert recall(packed, state) is None


def test_recall_refuses_another_packed_tensor_and_another_dtype():
    packed, state, _ = remembered_stub()
    assert recall(packed.clone(), state) is None
    assert recall(packed.t(), state) is None
    assert recall(packed[:-8], state) is None
    assert recall(packed, state, torch.bfloat16) is None


def test_recall_separates_result_dtype_from_state_dtype():
    packed, state, launch = remembered_stub(torch.bfloat16)
    assert recall(packed, state) is None and recall(packed, state, torch.bfloat16) is launch
    state.dtype = torch.float32
    assert recall(packed, state, torch.bfloat16) is None


@pytest.mark.parametrize("name", ["absmax", "code", "offset", "state2"])
def test_entry_is_dropped_with_any_of_its_objects(name):
    _, state, _ = remembered_stub()
    setattr(state, name, None)
    gc.collect()
    assert not is_remembered(state)


def test_plain_empty_and_row_weights_and_mutable_shapes_are_not_remembered():
    for change in ({"nested": False}, {"shape": (0, 5)}):
        packed, state = Weight(**{"shape": (64, 512), **change}).make("cpu")
        numel = torch.Size(state.shape).numel()
        remember(Launch(None, 1, (), (), (), numel, (), (), state.dtype, 0), packed, state)
        assert not is_remembered(state)
    packed, state = Weight(shape=(64, 512)).make("cpu")
    remember(Launch(None, 1, (), (), (), 64 * 512, (), (), state.dtype, 0), packed.t(), state)
    assert not is_remembered(state)
    state.shape = [64, 512]  # could be changed in place
    remember(Launch(None, 1, (), (), (), 64 * 512, (), (), state.dtype, 0), packed, state)
    assert not is_remembered(state)
