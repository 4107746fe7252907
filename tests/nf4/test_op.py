"""The torch op: opcheck, fake tensors, and torch.compile(fullgraph=True) with the same bits and one graph."""

import bitsandbytes as bnb
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.nf4.reference import Weight, assert_same_bits, reference
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.state import nf4_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.unsloth_puzzles.dequantize_nf4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(nested, dtype):
    packed, state = Weight(shape=(33, 17), nested=nested, dtype=dtype).make(DEVICE)
    result = torch.library.opcheck(OP, nf4_weight(packed, state))
    assert set(result.values()) == {"SUCCESS"}, result
    assert_same_bits(OP(*nf4_weight(packed, state)), reference(packed, state))


@pytest.mark.parametrize("row", [False, True])
def test_fake_tensors_have_the_shape_dtype_and_strides_of_real_ones(row):
    packed, state = Weight(shape=(6, 10), dtype=torch.bfloat16).make(DEVICE)
    packed = packed.t() if row else packed
    real = dequantize_nf4(packed, state)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = dequantize_nf4(mode.from_tensor(packed), state)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert fake.device == real.device


def test_dispatch_mode_sees_the_op():
    """Under a mode the output may be fake or traced: a launch past the dispatcher would write to no memory at all."""
    packed, state = Weight(shape=(6, 10)).make("cpu")
    if DEVICE == "cuda":
        pytest.skip("a CPU test: on a GPU it could only fail by an illegal address, for every later test too")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(dequantize_nf4(packed, state), FakeTensor)
    graph = make_fx(lambda packed: dequantize_nf4(packed, state))(packed).graph
    assert OP.default in [node.target for node in graph.nodes]


class Up(torch.nn.Module):
    """Two layers, so that one graph must hold two calls."""

    def __init__(self, storage=torch.uint8):
        super().__init__()
        options = {"quant_type": "nf4", "bias": False, "compute_dtype": torch.float32, "quant_storage": storage}
        self.first = bnb.nn.Linear4bit(64, 48, **options)
        self.second = bnb.nn.Linear4bit(48, 32, **options)
        self.to(DEVICE)


def from_module(up):
    return dequantize_nf4(up.first) + 0, dequantize_nf4(up.second)


def from_parameter(up):
    return dequantize_nf4(up.first.weight), dequantize_nf4(up.second.weight) * 1


def from_packed_and_state(up):
    return tuple(dequantize_nf4(layer.weight.data, layer.weight.quant_state) for layer in (up.first, up.second))


@pytest.mark.parametrize("function", [from_module, from_parameter, from_packed_and_state])
def test_compiled_in_one_graph_with_the_same_bits(function):
    up = Up()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for _ in range(2):  # the second call recompiles nothing
        for weight, layer in zip(compiled(up), (up.first, up.second), strict=True):
            assert_same_bits(weight, reference(layer.weight.data, layer.weight.quant_state))
    assert backend.frame_count == 1
    assert not counters["graph_break"]
    calls = [node for graph in backend.graphs for node in graph.graph.nodes if "dequantize_nf4" in str(node.target)]
    assert len(calls) == 2


def test_compiled_with_out():
    packed, state = Weight(shape=(33, 17)).make(DEVICE)
    out = torch.full(state.shape, float("nan"), dtype=state.dtype, device=DEVICE)
    compiled = torch.compile(lambda out: dequantize_nf4(packed, state, out=out), fullgraph=True, backend="aot_eager")
    compiled(out)
    assert_same_bits(out, reference(packed, state))


def test_inductor_with_a_following_matmul():
    """The default backend: the op stays opaque to it, and what follows uses its result."""
    up = Up(storage=torch.bfloat16)
    eye = torch.eye(64, device=DEVICE)
    compiled = torch.compile(lambda x: (x @ dequantize_nf4(up.first).t(), dequantize_nf4(up.first)), fullgraph=True)
    product, weight = compiled(eye)
    expected = reference(up.first.weight.data, up.first.weight.quant_state)
    assert_same_bits(weight, expected)
    assert torch.equal(product.cpu(), expected.t())
    assert not counters["graph_break"]


def test_gradients_stop_at_the_op():
    """The packed weight is frozen: the result requires no gradient, eager or compiled."""
    up = Up()
    for function in (from_module, torch.compile(from_module, fullgraph=True, backend="aot_eager")):
        assert not any(weight.requires_grad for weight in function(up))


def test_backward_notices_an_overwritten_weight():
    packed, state = Weight(shape=(32, 64), dtype=torch.float32).make(DEVICE)
    buffer = torch.empty(32, 64, device=DEVICE)
    x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    y = x @ dequantize_nf4(packed, state, out=buffer).t()
    dequantize_nf4(packed, state, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_tensor_outside_its_mode_is_never_launched_on():
    packed, state = Weight(shape=(32, 64)).make(DEVICE)
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(packed)
    for _ in range(2):
        assert isinstance(dequantize_nf4(fake, state), torch._subclasses.fake_tensor.FakeTensor)
