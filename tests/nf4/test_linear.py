"""nf4_linear: gradients against float64, what it keeps and what it computes, autocast, checkpointing, torch.compile."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.nf4.reference import STORAGE, Weight, reference
from unsloth_puzzles.nf4.linear import nf4_linear
from unsloth_puzzles.nf4.state import nf4_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN = 48, 80
TIGHT = 1e-6 if DEVICE == "cpu" else 1e-5  # float32; a GPU sums in another order
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(dtype=torch.float32, **options):
    """(packed, state), W in float64 and W in `dtype`: codes and absmax rounded once, whatever the state's dtype is."""
    packed, state = Weight(shape=(OUT, IN), dtype=options.pop("stored", dtype), **options).make(DEVICE)
    kept, state.dtype = state.dtype, torch.float32
    exact = reference(packed.view(-1, 1), state).to(DEVICE)
    state.dtype = kept
    return packed, state, exact.double(), exact.to(dtype)


def random(*shape, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def kept(function):
    """What autograd keeps from the forward to the backward."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        function()
    return found


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (1, 0, IN)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_and_gradients_against_float64(dtype, with_bias, shape):
    packed, state, exact, rounded = weight(dtype)
    x, bias = random(*shape, dtype=dtype, grad=True), random(OUT, dtype=dtype, seed=1, grad=True) if with_bias else None
    upstream = random(*shape[:-1], OUT, dtype=dtype, seed=2)  # neither ones nor constant: ignoring it shows
    wanted = [x, bias] if with_bias else [x]

    def run(function, inputs):
        y = function(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))

    ours = run(lambda x, bias=None: nf4_linear(x, packed, state, bias), wanted)
    plain = run(lambda x, bias=None: F.linear(x, rounded, bias), wanted)
    true = run(lambda x, bias=None: F.linear(x, exact, bias), [t.detach().double().requires_grad_() for t in wanted])
    for mine, theirs, right in zip(ours, plain, true, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, dtype)
        if right.count_nonzero() == 0:  # no rows: no result, or the bias's gradient of zeros
            assert mine.count_nonzero() == 0
        else:  # the sums may run in another order: a tenth of the dtype's rounding
            assert relative(mine, right) <= 1.01 * relative(theirs, right) + 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_made_in_the_dtype_it_is_multiplied_in(dtype, stored, dequantisations):
    packed, state, _, rounded = weight(dtype, stored=stored)
    x = random(3, IN, dtype=dtype, grad=True)
    y = nf4_linear(x, packed, state)
    y.sum().backward()
    assert dequantisations == [dtype, dtype]
    assert torch.equal(y, F.linear(x, rounded))  # via `stored` it would have been rounded twice
    assert state.dtype == stored


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_every_storage_and_orientation_of_the_packed_weight(storage, nested):
    packed, state, _, rounded = weight(nested=nested, storage=storage)
    x = random(3, IN)
    for given in (packed, packed.t(), packed.view(1, -1), packed.view(-1)):
        assert torch.equal(nf4_linear(x, given, state), F.linear(x, rounded))


def test_takes_a_module_with_its_bias_and_a_parameter_without():
    layer = bnb.nn.Linear4bit(IN, 64, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    x = random(3, IN)
    without = nf4_linear(x, layer.weight)
    assert torch.equal(nf4_linear(x, layer.weight, layer.weight.quant_state), without)
    assert torch.allclose(nf4_linear(x, layer), without + layer.bias)
    assert layer.bias.abs().max() > 0


def test_second_derivatives_and_torch_func():
    packed, state, exact, _ = weight()
    x = random(4, IN, grad=True)

    def loss(x, y=nf4_linear):
        return y(x, packed, state).square().sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert relative(second, torch.ones_like(x).double() @ (2 * exact.T @ exact)) < TIGHT
    assert torch.allclose(torch.func.grad(loss)(x.detach()), gradient)


# ---------------------------------------------------------------------------------- what is kept, what is computed


@pytest.mark.parametrize("with_bias", [False, True])
def test_backward_keeps_neither_the_weight_nor_x(with_bias):
    packed, state, _, rounded = weight()
    x, bias = random(3, IN, grad=True), random(OUT, grad=True) if with_bias else None
    (only,) = kept(lambda: nf4_linear(x, packed, state, bias))
    assert only.data_ptr() == packed.data_ptr() and only.numel() * only.element_size() == -(-OUT * IN // 2)
    assert any(t.numel() == OUT * IN for t in kept(lambda: F.linear(x, rounded, bias)))  # the check can fail


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("of_x, of_bias", [(True, False), (False, True), (True, True)])
def test_only_needed_gradients_are_computed(of_x, of_bias, dequantisations):
    packed, state, *_ = weight()
    x, bias = random(3, IN, grad=of_x), random(OUT, grad=of_bias)
    y = nf4_linear(x, packed, state, bias)
    del dequantisations[:]
    with Calls() as calls:
        y.backward(torch.ones_like(y))
    assert len(dequantisations) == calls.names.count("mm") == of_x
    assert calls.names.count("sum") == of_bias
    assert (x.grad is not None, bias.grad is not None) == (of_x, of_bias)


def test_no_graph_is_recorded_without_gradients():
    packed, state, *_ = weight()
    assert nf4_linear(random(3, IN), packed, state).grad_fn is None
    with torch.no_grad():
        assert nf4_linear(random(3, IN, grad=True), packed, state).grad_fn is None


def test_checkpointing_dequantizes_again(dequantisations):
    packed, state, *_ = weight()
    x = random(3, IN, grad=True)

    def block(x):
        return nf4_linear(x.sin(), packed, state).cos()

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    assert len(dequantisations) == 2  # forward, backward
    (actual,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert len(dequantisations) == 2 + 3  # forward, again, backward
    assert torch.equal(actual, expected)


# -------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(dtype, dequantisations):
    packed, state, exact, _ = weight()
    x, bias = random(3, IN, grad=True), random(OUT, grad=True)
    upstream = random(3, OUT, seed=2, dtype=dtype)
    with torch.autocast(DEVICE, dtype):
        y = nf4_linear(x, packed, state, bias)
        plain = F.linear(x, exact.float(), bias)
    assert y.dtype == plain.dtype == dtype and torch.equal(y, plain)
    for mine, theirs in zip(*(torch.autograd.grad(r, (x, bias), upstream) for r in (y, plain)), strict=True):
        assert mine.dtype == torch.float32 and torch.allclose(mine, theirs, rtol=2 * torch.finfo(dtype).eps)
    assert dequantisations == [dtype, dtype]
    with torch.autocast(DEVICE, dtype), torch.autocast(DEVICE, enabled=False):
        assert nf4_linear(x, packed, state).dtype == torch.float32


# --------------------------------------------------------------------------------------------------- torch.compile


def kept_by_graph(y):
    node = y.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert type(node).__name__ == "CompiledFunctionBackward"
    return node.saved_tensors


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_for_all_lengths_and_keeps_no_weight(backend):
    packed, state, *_ = weight()
    bias = random(OUT, seed=1, grad=True)
    counter = CompileCounterWithBackend(backend)

    def function(x, packed, state, bias):
        return nf4_linear(x.sin(), packed, state, bias) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 6, 9):
        x, upstream = random(2, length, IN, grad=True), random(2, length, OUT, seed=3)
        y, expected = compiled(x, packed, state, bias), function(x, packed, state, bias)
        # Were the backward's call equal to the forward's, the two would be merged and W kept, 8 times the packed bytes.
        assert not any(t.is_floating_point() and t.numel() == OUT * IN for t in kept_by_graph(y))
        assert any(t.data_ptr() == packed.data_ptr() for t in kept_by_graph(y))
        ours = torch.autograd.grad(y, (x, bias), upstream)
        eager = torch.autograd.grad(expected, (x, bias), upstream)
        for mine, theirs in zip((y, *ours), (expected, *eager), strict=True):
            assert relative(mine, theirs.double()) < TIGHT
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_a_module_and_autocast():
    layer = bnb.nn.Linear4bit(IN, 64, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    x = random(3, IN, grad=True)

    def function(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return nf4_linear(x, layer)

    y, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    gradients = [torch.autograd.grad(r.float().square().sum(), (x, layer.bias)) for r in (y, expected)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_opcheck_of_the_backward_op():
    packed, state, *_ = weight()
    arguments = (random(3, OUT), *nf4_weight(packed, state, torch.float32))
    result = torch.library.opcheck(torch.ops.unsloth_puzzles.dequantize_nf4_again, arguments)
    assert set(result.values()) == {"SUCCESS"}, result


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(3, IN, dtype=torch.float64)}, TypeError, "x must be float16.*got torch.float64"),
        ({"x": torch.zeros(3, IN, dtype=torch.int64)}, TypeError, "x must be float16.*got torch.int64"),
        ({"x": torch.zeros(3, IN + 1)}, ValueError, r"x must have a last dimension of 80 .*got shape \(3, 81\)"),
        ({"x": torch.zeros(())}, ValueError, r"x must have a last dimension of 80 .*got shape \(\)"),
        ({"x": torch.zeros(3, IN, device="meta")}, ValueError, "x must be on the weight's device.*got meta"),
        ({"bias": torch.zeros(IN)}, ValueError, r"bias must have shape \(48,\), got \(80,\)"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"quant_state": None}, ValueError, "quant_state must be a bitsandbytes QuantState, got none with Tensor"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    packed, state, *_ = weight()
    moved = {k: v.to(DEVICE) for k, v in change.items() if isinstance(v, torch.Tensor) and v.device.type != "meta"}
    given = {"x": random(3, IN), "weight": packed, "quant_state": state} | change | moved
    with pytest.raises(error, match=message):
        nf4_linear(**given)


def test_weight_that_is_no_matrix_is_refused():
    packed, state = Weight(shape=(300,)).make(DEVICE)
    with pytest.raises(ValueError, match=r"quant_state.shape must be \(out_features, in_features\), got \(300,\)"):
        nf4_linear(torch.zeros(3, 300, device=DEVICE), packed, state)


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_on_the_gpu_is_at_most_that_of_bitsandbytes(dtype, rows):
    full = random(1024, 2048, dtype=dtype) * 0.02
    packed, state = bnb.functional.quantize_4bit(full, compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32
    exact = bnb.functional.dequantize_4bit(packed, state).double()
    state.dtype = dtype
    x, upstream = random(rows, 2048, dtype=dtype, grad=True), random(rows, 1024, dtype=dtype, seed=2)
    true = (x.double() @ exact.T, upstream.double() @ exact)
    ours, theirs = nf4_linear(x, packed, state), bnb.matmul_4bit(x, packed, quant_state=state)
    ours = (ours, *torch.autograd.grad(ours, x, upstream))
    theirs = (theirs, *torch.autograd.grad(theirs, x, upstream))
    for mine, other, right in zip(ours, theirs, true, strict=True):
        assert relative(mine, right) <= 1.01 * relative(other, right) + 0.1 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_forward_leaves_only_its_result_on_the_gpu():
    full = random(4096, 4096, dtype=torch.float16)
    packed, state = bnb.functional.quantize_4bit(full, compress_statistics=True, quant_type="nf4")
    x = random(16, 4096, dtype=torch.float16, grad=True)
    nf4_linear(x, packed, state)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = nf4_linear(x, packed, state)
    assert torch.cuda.memory_allocated() - before == y.numel() * y.element_size()


def test_peft_layer_is_refused():
    import peft

    model = torch.nn.Sequential(bnb.nn.Linear4bit(IN, 64, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TypeError, match="weight must be a Linear4bit, got a PEFT layer"):
        nf4_linear(random(3, IN), adapted.base_model.model[0])


def test_bias_of_wrong_type_or_device_is_refused():
    packed, state, _, _ = weight()
    with pytest.raises(TypeError, match="bias must be a tensor, got str"):
        nf4_linear(random(3, IN), packed, state, "bias")
    with pytest.raises(ValueError, match="bias must be on x's device"):
        nf4_linear(random(3, IN), packed, state, torch.empty(state.shape[0], device="meta"))
