"""What is remembered between two calls on a GPU must never outlive what it was remembered of."""

import gc
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests.nf4.reference import Weight, assert_same_bits
from unsloth_puzzles.nf4 import dequantize_nf4, plan

pytestmark = pytest.mark.gpu


def remembered(**changes):
    """A weight de-quantised once, so that there is a plan for it."""
    packed, state = Weight(shape=(64, 512), **changes).make("cuda")
    first = dequantize_nf4(packed, state)
    assert plan.plan_of(id(state)) is not None
    return packed, state, first


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_second_call_goes_by_the_plan(dtype, storage, monkeypatch):
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


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_is_noticed(change):
    packed, state, _ = remembered()
    CHANGES[change](state)
    for _ in range(2):
        assert_same_bits(dequantize_nf4(packed, state), dequantize_4bit(packed, state))


def test_another_packed_tensor_is_noticed():
    packed, state, first = remembered()
    other = packed.flip(0).contiguous()
    assert_same_bits(dequantize_nf4(other, state), dequantize_4bit(other, state))
    assert not torch.equal(dequantize_nf4(other, state), first)
    with pytest.raises(ValueError, match="packed bytes"):
        dequantize_nf4(packed[:-8], state)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_nf4(torch.stack([packed, packed], -1)[..., 0], state)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("quant_type", "fp4", ValueError), ("blocksize", 48, ValueError), ("code", None, TypeError)],
)
def test_a_state_that_turns_bad_is_refused(name, value, error):
    packed, state, _ = remembered()
    setattr(state, name, value)
    with pytest.raises(error, match=name):
        dequantize_nf4(packed, state)


def test_nothing_is_kept_alive():
    packed, state, _ = remembered()
    absmax, key = weakref.ref(state.absmax), id(state)
    state.absmax = state.absmax.clone()
    gc.collect()
    assert absmax() is None and plan.plan_of(key) is None
    dequantize_nf4(packed, state)
    assert plan.plan_of(key) is not None
    del state
    gc.collect()
    assert plan.plan_of(key) is None


def test_another_stream_and_a_graph():
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


def test_an_unusual_state_has_no_plan():
    packed, state = Weight(shape=(64, 512), nested=False).make("cuda")
    assert_same_bits(dequantize_nf4(packed, state), dequantize_4bit(packed, state))
    assert plan.plan_of(id(state)) is None
