"""patch_linear4bit under real bitsandbytes models: same numbers, PEFT, checkpointing, copies, compile."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.nf4.patched import DEVICE, IDS, TIGHT, Fused, assert_same_step, llama, lora, relative, step
from unsloth_puzzles.nf4.patch import Linear4bitPatch, patch_linear4bit


@pytest.fixture(scope="module")
def trained():
    """A LoRA model and what its step is under bitsandbytes alone."""
    model = lora(llama()).train()
    return model, step(model)


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
