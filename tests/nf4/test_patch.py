"""patch_linear4bit under real bitsandbytes models: same numbers, same semantics, PEFT, checkpointing, compile, undo."""

import copy
import io
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.nf4.patch import Linear4bitPatch, patch_linear4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 on a CPU: the same products in the same order. On a GPU bitsandbytes' fused kernel sums in another order.
TIGHT = 1e-6 if DEVICE == "cpu" else 1e-5


class Fused(TorchDispatchMode):
    """Counts bitsandbytes' fused 4-bit GEMM."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.bitsandbytes.gemm_4bit.default
        return function(*args, **(kwargs or {}))


def linear4bit(quant_type="nf4", bias=True, compute_dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 96, bias=bias, quant_type=quant_type, compute_dtype=compute_dtype, **options)
    layer.support_avx512bf16_for_cpu = False  # else eval mode re-packs the weight, and rounds it, on CPUs that have it
    return layer.to(DEVICE)


def llama(dtype=torch.float32):
    return random_nf4_llama(tiny_llama_config(layers=2), DEVICE, dtype)


def lora(model):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: no gradient would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


IDS = (torch.arange(24) * 37 % 256).view(2, 12).to(DEVICE)


def step(model):
    """Loss and the gradients of everything trainable."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_same_step(actual, expected, bound=TIGHT):
    assert relative(actual[0], expected[0]) <= bound
    assert actual[1].keys() == expected[1].keys() and len(expected[1]) == 2 * 2 * 7
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0 and relative(actual[1][name], gradient) <= bound, name


@pytest.fixture(scope="module")
def trained():
    """A LoRA model and what its step is under bitsandbytes alone."""
    model = lora(llama()).train()
    return model, step(model)


# ---------------------------------------------------------------------------------------------------------- models


def test_lora_loss_and_gradients_are_those_of_bitsandbytes(trained, dequantisations):
    model, expected = trained
    with patch_linear4bit(model) as patch, Fused() as fused:
        assert_same_step(step(model), expected)
    assert fused.calls == 0
    # q, k, v of the first block have an input without gradient, as nothing below them is trained.
    assert len(dequantisations) == 14 + 14 - 3
    assert len(patch.names) == 14 and all(name.endswith("_proj.base_layer") for name in patch.names)


def test_lora_on_top_of_a_patched_model(trained):
    model = llama()
    with patch_linear4bit(model):
        model = lora(model).train()
        assert any(isinstance(module, peft.tuners.lora.bnb.Linear4bit) for module in model.modules())
        assert_same_step(step(model), trained[1])
    assert_same_step(step(model), trained[1])


def test_gradient_checkpointing(trained, dequantisations):
    model, expected = trained
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    try:
        with patch_linear4bit(model):
            assert_same_step(step(model), expected)
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
    assert len(dequantisations) == 3 * 14  # forward, again, backward


def test_autocast_gives_the_dtype_and_error_of_bitsandbytes(trained):
    model, exact = trained
    with torch.autocast(DEVICE, torch.bfloat16):
        theirs = step(model)
        with patch_linear4bit(model):
            ours = step(model)
    assert ours[0].dtype == theirs[0].dtype
    for name, gradient in exact[1].items():
        assert relative(ours[1][name], gradient) <= 1.5 * relative(theirs[1][name], gradient) + 1e-3, name


def test_generation_prefills_with_ours_and_decodes_with_the_fused_kernel(dequantisations):
    model = llama().eval()
    prompt = (torch.arange(10) * 37 % 256).view(1, -1).to(DEVICE)

    def generate():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, min_new_tokens=3
        )

    expected = generate()
    with patch_linear4bit(model, min_rows=10), Fused() as fused:
        assert torch.equal(generate(), expected)
    assert len(dequantisations) == 14  # the prompt
    assert fused.calls == 14 * 2  # the two tokens after the first


def test_state_dict_is_unchanged():
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with patch_linear4bit(model):
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        model.load_state_dict(before, strict=False)  # with bitsandbytes' extra keys of the quantisation state
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is bnb.nn.Linear4bit and "forward" not in vars(layer)


def test_copy_of_a_patched_model_is_patched_and_can_be_undone(dequantisations):
    model = llama()
    with patch_linear4bit(model, min_rows=0), torch.no_grad():
        twin = copy.deepcopy(model)
        expected = model(IDS).logits
        del dequantisations[:]
        assert torch.equal(twin(IDS).logits, expected)
        patched = len(dequantisations)
        layer, original = twin.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
        assert type(layer) is type(original) and layer.weight.data_ptr() != original.weight.data_ptr()
        patch = Linear4bitPatch.of(twin)
        assert len(patch.names) == 14
        patch.undo()
        assert type(layer) is bnb.nn.Linear4bit and type(original) is not bnb.nn.Linear4bit
        assert relative(twin(IDS).logits, expected) <= TIGHT and len(dequantisations) == patched == 14
    assert type(original) is bnb.nn.Linear4bit


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


# ------------------------------------------------------------------------------------------------ a layer's semantics


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


# -------------------------------------------------------------------------------------------------- hooks and undoing


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


# ------------------------------------------------------------------------------------------------------- bad input


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


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_lora_blocks_share_graphs_and_give_the_same_step(trained, monkeypatch):
    model, expected = trained
    counter = CompileCounterWithBackend("aot_eager")
    model.enable_input_require_grads()  # else the first block's input has no gradient, which is a graph of its own
    compiled = torch.compile(LlamaDecoderLayer.forward, fullgraph=True, dynamic=True, backend=counter)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", compiled)
    with patch_linear4bit(model):
        assert_same_step(step(model), expected)
    model.disable_input_require_grads()
    graphs = [graph for graph in counter.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(graphs) == 1


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


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_on_the_gpu(dtype):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs native bfloat16 (sm_80)")
    exact = step(lora(llama()).train())
    model = lora(llama(dtype)).train()
    theirs = step(model)
    with patch_linear4bit(model):
        ours = step(model)
    assert relative(ours[0], exact[0]) <= 1.5 * relative(theirs[0], exact[0]) + torch.finfo(dtype).eps
    for name, gradient in exact[1].items():
        assert relative(ours[1][name], gradient) <= 1.5 * relative(theirs[1][name], gradient) + 1e-3, name


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
