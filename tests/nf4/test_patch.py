"""patch_linear4bit on one layer: same semantics, hooks, pickling, undo, refusals, compile."""

import copy
import io
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch._dynamo.testing import CompileCounterWithBackend

from tests.nf4.patched import DEVICE, TIGHT, Fused, linear4bit, relative
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.patch import patch_linear4bit


def saved(model) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("hooked", [False, True])
def test_pickled_layer_is_the_one_of_bitsandbytes(hooked):
    model = torch.nn.Sequential(linear4bit(), linear4bit("fp4"))
    if hooked:  # and unhooked: accelerate leaves a bound method on the instance
        add_hook_to_module(model[0], Count())
        remove_hook_from_module(model[0])
    unpatched = saved(model)
    with pytest.warns(UserWarning, match="1 fp4"), patch_linear4bit(model):
        patched = saved(model)
        assert type(model[0]) is not bnb.nn.Linear4bit
    assert b"unsloth_puzzles" not in patched
    found, expected = (torch.load(io.BytesIO(file), weights_only=False) for file in (patched, unpatched))
    assert [type(layer) for layer in found] == [bnb.nn.Linear4bit] * 2
    assert vars(found[0]).keys() == vars(expected[0]).keys()
    assert type(found[0].weight) is type(expected[0].weight)
    assert torch.equal(found[0].weight, model[0].weight) and torch.equal(found[0].bias, model[0].bias)
    found[0].weight = copy.deepcopy(model[0].weight)  # the file of a Params4bit holds no quantisation state
    x = torch.randn(3, 64, device=DEVICE)
    assert torch.equal(found[0](x), model[0](x))
    patch_linear4bit(found[0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "compute_dtype, dtype",
    [(c, d) for c in (None, torch.float32, torch.bfloat16) for d in (torch.float32, torch.bfloat16)],
)
def test_dtypes_are_those_of_bitsandbytes(compute_dtype, dtype, grad, dequantisations):
    layer, x = linear4bit(compute_dtype=compute_dtype), torch.randn(2, 5, 64, device=DEVICE, dtype=dtype)
    twin = copy.deepcopy(layer)
    with torch.set_grad_enabled(grad):
        expected = twin(x)
        for min_rows in (0, 1000):
            with patch_linear4bit(layer, min_rows=min_rows):
                actual = layer(x)
            assert (actual.dtype, actual.requires_grad) == (dtype, grad)
            if torch.bfloat16 in (dtype, compute_dtype):
                assert torch.equal(actual, actual.bfloat16().to(dtype))
            # Two roundings to bfloat16 at most, the product's and, on a CPU, that of the weight, which bitsandbytes
            # does in another way there.
            rough = torch.bfloat16 in (dtype, compute_dtype)
            assert relative(actual, expected) < (2 * torch.finfo(torch.bfloat16).eps if rough else TIGHT)
    assert set(dequantisations) == {compute_dtype or dtype}
    assert layer.compute_dtype == twin.compute_dtype and layer.compute_type_is_set
    assert layer.bias.dtype == torch.float32  # bitsandbytes would have cast it for good


def test_rows_decide_without_gradients_only(dequantisations):
    layer = linear4bit()
    with patch_linear4bit(layer, min_rows=6):
        for shape, grad, ours in [((5, 64), False, 0), ((2, 3, 64), False, 1), ((64,), False, 0), ((5, 64), True, 1)]:
            del dequantisations[:]
            with torch.set_grad_enabled(grad), Fused() as fused:
                layer(torch.randn(shape, device=DEVICE))
            assert (len(dequantisations), fused.calls) == (ours, 1 - ours), (shape, grad)


def test_input_without_rows():
    layer = linear4bit()
    with patch_linear4bit(layer):
        assert layer(torch.zeros(0, 64, device=DEVICE)).shape == (0, 96)
        with torch.no_grad():
            assert layer(torch.zeros(2, 0, 64, device=DEVICE)).shape == (2, 0, 96)


def test_parameter_without_state_gets_that_of_the_module():
    layer, x = linear4bit(), torch.randn(3, 64, device=DEVICE)
    expected = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP leaves it
    layer.quant_storage = torch.uint8
    with patch_linear4bit(layer):
        assert relative(layer(x), expected) < TIGHT
    assert isinstance(layer.weight, bnb.nn.Params4bit)


class Count(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("patch_first", [True, False])
def test_accelerate_hooks_and_the_patch_keep_each_other(patch_first, dequantisations):
    layer, hook, x = linear4bit(), Count(), torch.randn(3, 64, device=DEVICE)
    expected = layer(x)
    patch = patch_linear4bit(layer) if patch_first else None
    add_hook_to_module(layer, hook)
    patch = patch or patch_linear4bit(layer)
    assert relative(layer(x), expected) < TIGHT and (hook.calls, len(dequantisations)) == (1, 1)
    remove_hook_from_module(layer)  # leaves a bound method on the instance
    assert relative(layer(x), expected) < TIGHT and (hook.calls, len(dequantisations)) == (1, 2)
    patch.undo()
    assert torch.equal(layer(x), expected) and len(dequantisations) == 2
    with patch_linear4bit(layer):
        layer(x)
    assert len(dequantisations) == 3


def test_second_undo_does_nothing():
    layer = linear4bit()
    patch = patch_linear4bit(layer)
    assert isinstance(layer, bnb.nn.Linear4bit) and type(layer) is not bnb.nn.Linear4bit
    assert "1 of 1" in repr(patch)
    patch.undo()
    patch.undo()
    assert type(layer) is bnb.nn.Linear4bit and "0 of 1" in repr(patch)
    with pytest.raises(ZeroDivisionError), patch_linear4bit(layer):
        1 / 0  # noqa: B018
    assert type(layer) is bnb.nn.Linear4bit


def test_undo_refuses_a_layer_of_another_class():
    layer = linear4bit()
    patch = patch_linear4bit(layer)
    layer.__class__ = type("FSDPLinear4bit", (type(layer),), {})
    with pytest.raises(
        RuntimeError, match="must still be of the class that patch_linear4bit gave it, got a FSDPLinear4bit"
    ):
        patch.undo()


def test_patching_twice_is_refused():
    model = torch.nn.Sequential(linear4bit())
    with patch_linear4bit(model), pytest.raises(ValueError, match="model must not be patched yet, got 0"):
        patch_linear4bit(model)


def test_models_without_nf4_layers_are_refused():
    with pytest.raises(ValueError, match=r"model must have bitsandbytes Linear4bit layers.*got no Linear4bit"):
        patch_linear4bit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must have bitsandbytes Linear4bit layers.*got 1 fp4"):
        patch_linear4bit(torch.nn.Sequential(linear4bit("fp4")))


def test_fp4_layers_are_left_with_a_warning():
    model = torch.nn.Sequential(linear4bit("fp4"), linear4bit())
    with pytest.warns(UserWarning, match="left to bitsandbytes.*1 fp4") as caught:
        patch = patch_linear4bit(model)
    assert caught[0].filename == __file__
    assert patch.names == ("1",) and type(model[0]) is bnb.nn.Linear4bit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_linear4bit(torch.nn.Sequential(linear4bit()))


def test_layer_with_its_own_forward_is_refused():
    layer = linear4bit()
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="got 1 with a forward of its own"):
        patch_linear4bit(torch.nn.Sequential(linear4bit(), layer))
    other = linear4bit()
    other.__class__ = type("Mine", (bnb.nn.Linear4bit,), {"forward": lambda self, x: x})
    model = torch.nn.Sequential(linear4bit(), other)
    with pytest.raises(ValueError, match="got 1 with a forward of its own"):
        patch_linear4bit(model)
    assert type(model[0]) is bnb.nn.Linear4bit  # all or nothing


def test_weight_repacked_for_the_cpu_is_refused():
    layer = linear4bit()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="whose weight was re-packed"):
        patch_linear4bit(layer)


@pytest.mark.parametrize(
    "model, min_rows, error, message",
    [
        ("llama", 1, TypeError, "model must be a torch.nn.Module, got str"),
        (
            torch.nn.DataParallel(torch.nn.Identity()),
            1,
            TypeError,
            "model must be on one GPU, got an nn.DataParallel",
        ),
        (torch.nn.Identity(), 1.5, TypeError, "min_rows must be an integer or None, got 1.5"),
        (torch.nn.Identity(), True, TypeError, "min_rows must be an integer or None, got True"),
        (torch.nn.Identity(), -1, ValueError, "min_rows must be 0.*got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, min_rows, error, message):
    with pytest.raises(error, match=message):
        patch_linear4bit(model, min_rows=min_rows)


@pytest.mark.usefixtures("fresh_dynamo")
def test_lengths_do_not_recompile():
    layer = linear4bit()
    counter = CompileCounterWithBackend("aot_eager")
    lengths = [30, 3, 40, 5, 2, 20, 7, 35]
    xs = [torch.randn(2, length, 64, device=DEVICE) for length in lengths]
    with torch.no_grad():
        expected = [layer(x) for x in xs]
    torch._dynamo.reset()
    with patch_linear4bit(layer, min_rows=32):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        with torch.no_grad():
            for x, right in zip(xs, expected, strict=True):
                assert relative(compiled(x), right) < TIGHT
        assert counter.frame_count == 2  # fewer rows, more rows
        for x in xs:
            compiled(x.requires_grad_())
        assert counter.frame_count == 3  # with gradients: one


@pytest.mark.gpu
def test_decoding_runs_the_fused_kernel_alone():
    layer = linear4bit(compute_dtype=torch.float16)
    x = torch.randn(1, 1, 64, device=DEVICE, dtype=torch.float16)
    with patch_linear4bit(layer), torch.no_grad():
        layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(x)
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert not any("dequantize_nf4_kernel" in name for name in names), names
    assert any("4bit" in name.lower() for name in names), names


@pytest.mark.skipif(DEVICE != "cpu", reason="bitsandbytes' kernels for a CPU")
@pytest.mark.parametrize("columns", [32, 96, 128])
def test_few_rows_on_a_cpu_are_right_for_any_width(columns):
    layer = bnb.nn.Linear4bit(columns, 8, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    x = torch.randn(3, columns)
    expected = x @ dequantize_nf4(layer).float().T
    with patch_linear4bit(layer), torch.no_grad():
        assert relative(layer(x), expected) < TIGHT
