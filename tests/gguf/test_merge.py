"""A merged state dict holds what the model computes with, in float32, and is refused where that cannot be known."""

import copy
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear8bitLt
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.models import random_llama, tiny_llama_config
from tests.gguf.models import nf4_layer, qlora, with_adapters
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.gguf.merge import merged_state_dict
from unsloth_puzzles.gguf.weights import NF4

IDS = torch.arange(40).view(2, 20)
ADAPTERS = (
    {}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": "all-linear"},
    {"trainable_token_indices": [3, 63, 5]},
)  # fmt: skip


def wide(**options):
    """The float32 counterpart of `qlora`."""
    return with_adapters(random_llama(tiny_llama_config(64), "cpu"), **options)


def _llama():
    return random_llama(tiny_llama_config(64), "cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(merged, config) -> nn.Module:
    """A float32 model with the merged weights, each parameter of which they must name."""
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(dict(merged))
    return model


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_merged_weights_give_the_logits_of_the_adapted_model(options, bits):
    model = qlora(**options) if bits == 4 else wide(**options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)  # the copies of modules_to_save, too
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    for attribute in ("quantization_config",):
        vars(config).pop(attribute, None)
    merged = merged_state_dict(model)
    expected = logits(model)
    found = logits(loaded(merged, config))
    assert (found - expected).norm() / expected.norm() < 1e-5
    with model.disable_adapter():
        plain = logits(model)
        assert (logits(loaded(merged_state_dict(model), config)) - plain).norm() / plain.norm() < 1e-5
    assert (plain - expected).norm() / expected.norm() > 1e-3


def test_merge_is_exact_where_peft_quantises_again():
    model = qlora()
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    layer.lora_B["default"].weight.data *= 0.02  # changes of a step of NF4 or less, as training makes
    weight = layer.base_layer.weight
    base = NF4(weight, weight.quant_state).tensor()
    change = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.equal(merged_state_dict(model)[f"{name}.weight"], base + change.detach())
    again = model.merge_and_unload().get_submodule(name).weight
    error = (dequantize_4bit(again.data, again.quant_state).float() - (base + change)).norm()
    assert error > 0.5 * change.norm()


def test_nothing_is_computed_before_it_is_read_and_the_model_stays():
    model = qlora()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merged_state_dict(model)
    assert len(merged) == len(list(merged)) == 2 * 9 + 3
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1)
    assert torch.equal(merged["model.norm.weight"], model.get_base_model().model.norm.weight)
    before["base_model.model.model.norm.weight"] += 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_asking_for_a_name_computes_nothing(monkeypatch):
    merged = merged_state_dict(qlora())
    monkeypatch.setattr(NF4, "rows", None)
    assert "model.layers.0.self_attn.q_proj.weight" in merged and "other" not in merged
    with pytest.raises(TypeError):
        merged["model.layers.0.self_attn.q_proj.weight"]


def test_half_precision_is_merged_in_float32():
    model = with_adapters(random_llama(tiny_llama_config(64), "cpu", torch.bfloat16))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = layer.base_layer.weight.float() + layer.scaling["default"] * product
    assert torch.equal(merged_state_dict(model)["model.layers.0.mlp.down_proj.weight"], expected.detach())


def test_two_adapters_add_up():
    model = wide()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    found = logits(loaded(merged_state_dict(model), config))
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_merged_16_bit_adapters_are_not_merged_twice():
    model = wide()
    expected = merged_state_dict(model)["model.layers.0.self_attn.q_proj.weight"]
    model.merge_adapter()
    found = merged_state_dict(model)["model.layers.0.self_attn.q_proj.weight"]
    assert (found - expected).norm() / expected.norm() < 1e-6


def _merged_in_4_bits():
    model = qlora()
    model.merge_adapter()
    return model


def _nested():
    model = wide()
    layer = model.get_base_model().model.layers[0].self_attn
    layer.k_proj = LoraLinear(layer.k_proj, "outer", LoraConfig(r=2), r=2)
    return model


def _merged_and_switched_off(switch):
    model = wide(target_modules=["v_proj"])
    model.merge_adapter()
    switch(model)
    return model


def _switch_off(model):
    model.base_model.disable_adapter_layers()


def _of_layer(**options):
    return nn.Sequential(nf4_layer(**options))


def _of_8_bits():
    layer = Linear8bitLt(4, 4, bias=False, has_fp16_weights=False)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


def _packed():
    model = nn.Sequential(nf4_layer())
    pack_nf4(model)
    return model


def _in_buffers():
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))
    layer.register_buffer("cache", torch.zeros(4), persistent=False)  # no weight
    return nn.Sequential(layer)


def _bias():
    model = random_llama(tiny_llama_config(64), "cpu")
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_bias=True))


IA3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def _adapted(config):
    return get_peft_model(random_llama(tiny_llama_config(64), "cpu"), config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: [], r"model must be a torch\.nn\.Module, got list"),
        (_merged_in_4_bits, r"model must have unmerged adapters on its 4-bit layers, got model\.layers\.0\."),
        (
            lambda: _merged_and_switched_off(_switch_off),
            r"model must have unmerged adapters where they are switched off, got model\.layers\.0\.self_attn\.v_proj, "
            r"which is merged and switched off; call model\.unmerge_adapter\(\) first",
        ),
        (
            _nested,
            r"one adapter layer around each layer, got Linear inside another in model\.layers\.0\.self_attn\.k",
        ),
        (lambda: _of_layer(quant_type="fp4"), r"model must have NF4 weights, got fp4 in 0\.weight"),
        (_of_8_bits, r"model must have NF4, float32, float16 or bfloat16 weights, got torch\.int8 in 0\.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), r"model must be loaded, got 0\.weight on the meta"),
        (_packed, r"model must have whole weights, got .* in 0\.weight; undo what packs or shards it first"),
        (lambda: _adapted(IA3), r"model must have LoRA or DoRA adapters only, got IA3"),
        (
            lambda: _adapted(IA3).get_base_model(),
            r"LoRA or DoRA adapters only, got peft\.tuners\.ia3\.layer\.Linear in model\.layers\.0\.self_attn\.k_proj",
        ),
        (lambda: _adapted(PROMPT), r"model must have LoRA or DoRA adapters only, got PROMPT_TUNING"),
        (_bias, r"model must have adapters without biases, got lora_bias in"),
        (_in_buffers, r"model must keep its weights in parameters, got the buffer 0\.qweight$"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        merged_state_dict(make())


@pytest.mark.parametrize(
    "wrap, name, instead",
    [
        (
            lambda: get_peft_model(_llama(), LoraConfig(target_modules=["q_proj"]), mixed=True),
            "PeftMixedModel",
            "mixed=",
        ),
        (lambda: wide().base_model, "LoraModel", "give the PeftModel itself"),
        (lambda: nn.Sequential(wide()), "PeftModel in 0", "give the PeftModel itself"),
        (lambda: torch.compile(_llama()), "OptimizedModule", "give the model that torch.compile was given"),
        (lambda: nn.DataParallel(_llama()), "DataParallel", r"give its \.module"),
    ],
    ids=["mixed", "tuner", "inside", "compiled", "parallel"],
)
def test_wrappers_that_change_names_are_refused(wrap, name, instead):
    with pytest.raises(TypeError, match=rf"^model must be a model of transformers .* got {name}; .*{instead}"):
        merged_state_dict(wrap())


@pytest.mark.parametrize("compiled", ["whole", "inside"])
def test_compiled_model_with_adapters_is_refused(compiled):
    model = wide()
    if compiled == "inside":
        layers = model.get_base_model().model.layers
        layers[1] = torch.compile(layers[1])
    else:
        model = torch.compile(model)
    with pytest.raises(TypeError, match=r"^model must be .* got OptimizedModule"):
        merged_state_dict(model)


@pytest.mark.parametrize("switch", ["context", "layers"])
def test_adapters_that_are_merged_and_switched_off(switch):
    """PEFT unmerges them in the next forward. Without one the weights are the merged ones."""
    model = wide()
    name = "model.layers.1.mlp.down_proj.weight"
    base, on = wide().get_base_model().model.layers[1].mlp.down_proj.base_layer.weight, merged_state_dict(model)[name]
    model.merge_adapter()
    off = model.disable_adapter() if switch == "context" else nullcontext(model.base_model.disable_adapter_layers())
    with off:
        with pytest.raises(ValueError, match="switched off"):
            merged_state_dict(model)
        model.unmerge_adapter()
        found = merged_state_dict(model)[name]
    assert (found - base).norm() < 1e-6 * base.norm() < 1e-3 * (on - base).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_do_not_share_memory_with_the_model(dtype):
    model = with_adapters(random_llama(tiny_llama_config(64), "cpu", dtype), modules_to_save=["lm_head"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in merged_state_dict(model).values():
        value.mul_(2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.get_base_model().model.norm.weight.data.fill_(5)
    merged = merged_state_dict(model)
    norm = merged["model.norm.weight"]
    model.get_base_model().model.norm.weight.data.fill_(7)
    assert torch.equal(norm, torch.full_like(norm, 5)) and torch.equal(merged["model.norm.weight"], norm + 2)


@pytest.mark.parametrize("targets", [["embed_tokens.weight"], ["lm_head.weight", "q_proj.weight"]], ids=str)
def test_target_parameters_are_merged(targets):
    model = wide(target_modules=["v_proj"], target_parameters=targets)
    assert sum(isinstance(one, ParamWrapper) for one in model.modules()) == (3 if len(targets) > 1 else 1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    found = logits(loaded(merged_state_dict(model), config))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    with model.disable_adapter():
        plain = logits(model)
    assert (plain - expected).norm() > 1e-3 * expected.norm()


def _tied(dtype, vocabulary, **options):
    """Embeddings and head are one parameter, and PEFT ties what it trains of them."""
    config = tiny_llama_config(64)
    config.tie_word_embeddings, config.vocab_size = True, vocabulary
    model = with_adapters(random_llama(config, "cpu", dtype), ensure_weight_tying=True, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, LlamaForCausalLM(config).config


@pytest.mark.parametrize("vocabulary", [96, 64])  # 64 is the hidden size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "use_rslora": True},
        {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_tied_adapters_are_merged_as_the_model_computes_with_them(options, dtype, vocabulary):
    model, config = _tied(dtype, vocabulary, **options)
    names = ("lm_head", "model.embed_tokens")
    saved = "modules_to_save" in options
    merged = merged_state_dict(model)
    assert merged.shared(*(f"{name}.weight" for name in names)) == saved
    for name in names:
        module = model.get_base_model().get_submodule(name)
        if saved:  # of PEFT's own merge
            expected = module.modules_to_save["default"].weight
        else:  # PEFT's own merge adds the change to the shared parameter twice
            expected = module.get_base_layer().weight.float() + module.get_delta_weight("default")
        assert (merged[f"{name}.weight"] - expected).norm() <= 1e-6 * expected.norm(), name
    if dtype == torch.float32:
        expected = logits(model)
        config.tie_word_embeddings = False
        found = logits(loaded(merged, config))
        assert (found - expected).norm() / expected.norm() < 1e-5
    if saved:
        found, expected = dict(merged), model.float().merge_and_unload().state_dict()
        assert all(torch.equal(found[f"{name}.weight"], expected[f"{name}.weight"]) for name in names)


def test_peft_merges_tied_adapters_twice():
    """If this fails, PEFT merges them once, and the docstring of `merge` is to be changed."""
    model, _ = _tied(torch.float32, 96, target_modules=["embed_tokens"])
    head = model.get_base_model().lm_head
    base, change = head.get_base_layer().weight.clone(), head.get_delta_weight("default")
    assert (model.merge_and_unload().lm_head.weight - base - 2 * change).norm() <= 1e-5 * change.norm()


def test_tied_weights_are_told_from_trained_copies():
    for options, shared in (
        ({}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"trainable_token_indices": [3, 5]}, True),
    ):
        merged = merged_state_dict(wide(**options))
        assert merged.shared("lm_head.weight", "model.embed_tokens.weight") == shared


def test_trained_tokens_are_merged_once_and_for_the_active_adapter():
    model = wide(trainable_token_indices=[3, 5])
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7]))
    embedding = model.get_base_model().model.embed_tokens.token_adapter
    base = embedding.base_layer.weight.clone()
    for number, adapter in enumerate(("default", "other"), start=1):
        embedding.trainable_tokens_delta[adapter].data += number
    for adapter, changed in (("default", {3: 1, 5: 1}), ("other", {7: 2})):
        model.set_adapter(adapter)
        found = merged_state_dict(model)["model.embed_tokens.weight"] - base
        assert {
            row: round(found[row].mean().item(), 3) for row in found.abs().sum(1).nonzero().flatten().tolist()
        } == changed
    before = merged_state_dict(model)["lm_head.weight"]
    model.merge_adapter()
    assert torch.equal(merged_state_dict(model)["lm_head.weight"], before)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"switched off, got model\.embed_tokens, which"):
        merged_state_dict(model)
