"""Every kind of adapter that PEFT has, over NF4 layers: the values of bitsandbytes' own layers and of the uncompiled
model, or refused by its name.

A sample runs by default, with Dynamo and AOTAutograd; all of them, with Inductor, as `pytest -m slow`.
"""

from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from tests.compiled.models import nf4_llama, traced_only
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.checks import KINDS
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

PEFT_0_20 = version("peft").startswith("0.20.")
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
LORA = {"r": 4, **ALL}
PROMPT = {"num_virtual_tokens": 3}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
COMPILED = {
    "LORA": LORA,
    "LORA, dropout": {**LORA, "lora_dropout": 0.3},
    "LORA, a bias on B": {**LORA, "lora_bias": True},
    "LORA, rank-stabilised": {**LORA, "use_rslora": True},
    "LORA, tokens": {**LORA, "trainable_token_indices": {"embed_tokens": [1, 2]}},
    "LORA, embeddings": {**LORA, "target_modules": [*ALL["target_modules"], "embed_tokens"]},
    "LORA, a head": {**LORA, "modules_to_save": ["lm_head"]},
    "LORA, norms": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": NORMS},
    "ADALORA": {**ALL, "total_step": 10, "init_r": 4, "target_r": 2},
    "BEFT": ALL,
    "BOFT": {**ALL, "boft_block_size": 4},
    "C3A": {**ALL, "block_size": 16},
    "FOURIERFT": {**ALL, "n_frequency": 20},
    "GRALORA": ALL,
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": ALL,
    "LN_TUNING": {"target_modules": NORMS},
    "MISS": ALL,
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_ranks": 1, "num_tasks": 2},
    "OFT": {**ALL, "oft_block_size": 4, "r": 0},
    "P_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "RANDLORA": {**ALL, "r": 4},
    "ROAD": {**ALL, "group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2, 3]},
    "VERA": {**ALL, "r": 4},
}
REFUSED = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},  # its wrapper keeps the model's old forward
    "CARTRIDGE": PROMPT,
    "HIRA": ALL,
    "POLY": {**ALL, "r": 4, "n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": PROMPT,
    "PVERA": {**ALL, "r": 4},
    "SHIRA": {**ALL, "r": 2},
    "VBLORA": {**ALL, "vector_length": 8, "num_vectors": 16},
    "WAVEFT": {**ALL, "n_frequency": 20},
    "LORA, DoRA": {**LORA, "use_dora": True},
    "LORA, activated": {**LORA, "alora_invocation_tokens": [5, 6]},
    "LORA, layers used twice": {**LORA, "layer_replication": [(0, 1), (0, 1)]},
    "OFT, dropout": {**ALL, "oft_block_size": 4, "r": 0, "module_dropout": 0.5},
    "BOFT, dropout": {**ALL, "boft_block_size": 4, "boft_dropout": 0.5},
}
# PEFT gets no gradient of them over NF4 layers, or needs more than a layer; they are refused by their kind alone.
NOT_OVER_NF4 = (
    "ADAMSS", "CPT", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT", "TINYLORA",
    "UNILORA", "XLORA", *(() if PEFT_0_20 else ("SHADOW", "SUPERTUNING")),
)  # fmt: skip
SAMPLE = ("ADALORA", "IA3")


def tiers(names):
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in names]


def adapted(base, name):
    kind, options = PeftType[name.split(",")[0]], {**COMPILED, **REFUSED}[name]
    torch.manual_seed(0)
    return get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)).train()


def make_model(name, checkpointing=False):
    base = nf4_llama(layers=1)
    if PEFT_0_20 and name.startswith("OFT"):
        with pytest.raises(TypeError, match=r"^Linear4bit.* missing 1 required positional argument: 'config'"):
            adapted(base, name)
        pytest.skip("PEFT 0.20 cannot make OFT over 4-bit layers")
    model = adapted(base, name)
    with torch.no_grad():  # many begin as nothing, under which others have no gradient
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step(model):
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[:, 3], ids[:, 4] = 5, 6  # which activate activated LoRA
    tasks = model.active_peft_config.peft_type in (PeftType.MULTITASK_PROMPT_TUNING, PeftType.POLY)
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(input_ids=ids, labels=ids, **({"task_ids": torch.tensor([0, 1])} if tasks else {})).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, bound):
    assert (found[0] - expected[0]).abs() <= bound * expected[0]
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0 and (found[1][name] - gradient).norm() <= bound * gradient.norm(), name


def test_every_peft_type_is_listed():
    names = {name.split(",")[0] for name in (*COMPILED, *REFUSED)} | set(NOT_OVER_NF4)
    assert names == {kind.name for kind in PeftType}
    assert {name.split(",")[0] for name in COMPILED} == {kind.name for kind in KINDS}


@pytest.mark.parametrize("name", tiers([*COMPILED, *REFUSED]))
def test_patched_layers_match_bitsandbytes(name):
    model = make_model(name)
    expected = step(model)
    with patch_linear4bit(model):
        assert_same(step(model), expected, 2e-6)


def test_compiled_matches_uncompiled_model():
    assert_compiled_is_the_same("ADALORA", True, traced_only(), {"compile": False})


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_matches_uncompiled_model(name, checkpointing):
    if "dropout" in name:
        pytest.skip("Inductor draws other numbers")
    assert_compiled_is_the_same(name, checkpointing, nullcontext(), {})


@pytest.mark.slow
def test_dropout_matches_uncompiled_model():
    for checkpointing in (False, True):
        assert_compiled_is_the_same("LORA, dropout", checkpointing, traced_only(), {"compile": False})


def in_float64(model, name):
    """The same adapters, in float64, over the same weights, de-quantised."""
    base = nf4_llama(layers=1)
    for module in [*base.modules()]:
        for place, layer in [*module.named_children()]:
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # [out_features, in_features]
                plain = nn.Linear(*weight.shape[::-1], bias=False)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                setattr(module, place, plain)
    exact = adapted(base, name).double()
    given = dict(model.named_parameters())
    with torch.no_grad():
        for place, parameter in exact.named_parameters():
            if parameter.shape == given[place].shape:  # all but the de-quantised weights
                parameter.copy_(given[place])
    return exact


def assert_as_near_to_float64(found, uncompiled, exact):
    """Up to 1.5 times as far from float64 as the uncompiled model in float32, and 2e-6 for sums in another order."""
    assert found[1].keys() == uncompiled[1].keys() == exact[1].keys() != set()
    for name in ("", *exact[1]):
        ours, theirs, true = ((each[1][name] if name else each[0]).double() for each in (found, uncompiled, exact))
        far, allowed = (ours - true).norm(), 1.5 * (theirs - true).norm() + 2e-6 * true.norm()
        assert true.norm() > 0 and far <= allowed, (name, far / true.norm(), allowed / true.norm())


def assert_compiled_is_the_same(name, checkpointing, how, options):
    torch._dynamo.reset()
    model = make_model(name)
    exact = step(in_float64(model, name))
    with patch_linear4bit(model):
        uncompiled = step(model)
    model = make_model(name, checkpointing)
    with how, count_compilations() as counts, compile_qlora(model, **options):
        assert_as_near_to_float64(step(model), uncompiled, exact)
    assert counts.graph_breaks == {} and not any(one.reason for one in counts.captures), counts.table()
    assert any(one.name.startswith("LlamaDecoderLayer") for one in counts.captures)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_adapters_are_refused_by_name(name):
    argument = {
        "LORA, DoRA": "lora_variant must be .* got DoraLinearVariant",
        "LORA, activated": "lora_variant must be .* got ALoraLinearVariant",
        "LORA, layers used twice": "layer_replication",
        "OFT, dropout": "module_dropout", "BOFT, dropout": "module_dropout",
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{argument.get(name, f'peft_type must be one of .* got {name} ')}"):
        compile_qlora(make_model(name))


def test_adapter_kinds_without_a_sample_are_refused_by_name(monkeypatch):
    model = make_model("IA3")
    for name in NOT_OVER_NF4:
        monkeypatch.setattr(model.peft_config["default"], "peft_type", PeftType[name])
        with pytest.raises(ValueError, match=rf"^peft_type must be one of .* got {name} \(adapter 'default'\)"):
            compile_qlora(model)
