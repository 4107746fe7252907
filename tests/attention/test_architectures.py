"""Architectures of transformers in miniature: their logits and tokens with our attention are those with SDPA.

Or our attention refuses by name what it does not know. Nothing else.
"""

import functools

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from unsloth_puzzles.attention.models import NAME, make_mask, register

register()
LENGTH = 14
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "sliding_window": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "word_embed_proj_dim": 64, "ffn_dim": 96,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# The rotated part is 8 of 24; values have 16.
LATENT = {
    **EXPERTS, "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"]}
# Name of the architecture -> what its config needs beside `SMALL`; None takes a name away.
MODELS = {
    "llama": {}, "mistral": {}, "gemma3_text": ALTERNATE, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "gpt2": GPT,
    "opt": SEQ2SEQ, "qwen3": {}, "llama4_text": {**EXPERTS, "intermediate_size_mlp": 96, "attention_chunk_size": 6,
    "layer_types": ["chunked_attention", "full_attention"]}, "cohere2": ALTERNATE,
    # The rest is the slow tier's.
    "afmoe": EXPERTS, "apertus": {}, "arcee": {}, "aria_text": {"moe_num_experts": 4}, "axk1": LATENT, "bart": SEQ2SEQ,
    "bert": {}, "bert-generation": {}, "biogpt": {}, "bitnet": {}, "blenderbot": SEQ2SEQ, "camembert": {},
    "cohere": {}, "cwm": {}, "diffllama": {}, "dots1": EXPERTS, "electra": {}, "ernie": {}, "ernie4_5": {},
    "exaone4": {}, "gemma": {}, "glm": {}, "glm4": {}, "glm4_moe": EXPERTS,
    "glm4_moe_lite": LATENT, "gpt_bigcode": GPT, "gpt_neox": {}, "granite": {}, "granitemoe": EXPERTS, "helium": {},
    "hunyuan_v1_dense": {}, "jetmoe": EXPERTS, "marian": SEQ2SEQ, "mbart": SEQ2SEQ, "minicpm3": LATENT,
    "minimax_m2": EXPERTS, "ministral": {}, "mixtral": EXPERTS, "modernbert-decoder": ALTERNATE, "nemotron": {},
    "olmo": {}, "olmo2": {}, "olmo3": ALTERNATE, "olmoe": {**EXPERTS, "sliding_window": None}, "pegasus": SEQ2SEQ,
    "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": EXPERTS, "qwen2": {"use_sliding_window": True},
    "qwen3_moe": EXPERTS, "roberta": {}, "seed_oss": {}, "smollm3": {}, "solar_open": EXPERTS, "stablelm": {},
    "starcoder2": {}, "whisper": SEQ2SEQ, "youtu": LATENT,
}  # fmt: skip
SAMPLE = list(MODELS)[:10]
# What is refused, always, and how the message begins.
REFUSED = {
    **dict.fromkeys(("gpt_oss", "granite_swa", "mimo_v2_flash"), (EXPERTS, "s_aux must be left out")),
    "deepseek_v32": (LATENT, "attention_mask must be a tensor for a model that takes a part of it"),
    "doge": ({}, "attention_mask must be a tensor for a model that reads its dtype"),
}  # fmt: skip
# Encoders as decoders: transformers' own attention fails, too, when they generate with a cache.
NO_CACHE = ("bert", "bert-generation", "camembert", "electra", "ernie", "roberta")

LEFT = (torch.arange(LENGTH) >= torch.tensor([[0], [5], [1]])).long()
RIGHT = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [9], [13]])).long()
PACKED = torch.cat([torch.arange(4), torch.arange(7), torch.arange(3)])[None].expand(3, -1)
INPUTS = {
    "plain": {},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": RIGHT},
    "packed": {"position_ids": PACKED, "use_cache": False},
}
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def config_of(name, changed):
    options = {key: value for key, value in {**SMALL, **changed}.items() if value is not None}
    return AutoConfig.for_model(name, **options)


@functools.cache
def pair(name):
    """(the model with SDPA, the same with our attention)"""
    made = []
    for implementation in ("sdpa" if name in MODELS else "eager", NAME):
        changed = MODELS[name] if name in MODELS else REFUSED[name][0]
        # A model that is asked for our attention makes its parts with it; asked later, some parts keep their own.
        made.append(AutoModelForCausalLM.from_config(config_of(name, changed), attn_implementation=implementation))
    generator = torch.Generator().manual_seed(0)
    for parameter in made[0].parameters():
        if parameter.dim() > 1:  # sharp enough for attention to matter
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    made[1].load_state_dict(made[0].state_dict())
    return [model.eval() for model in made]


def logits(model, inputs):
    found = model(IDS, **inputs).logits
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found


@pytest.fixture
def calls(monkeypatch):
    """How often our attention was called."""
    ours, count = AttentionInterface._global_mapping[NAME], [0]

    def counted(*args, **kwargs):
        count[0] += 1
        return ours(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, counted)
    return count


@torch.no_grad()
def check(name, calls):
    theirs, ours = pair(name)
    for kind, inputs in INPUTS.items():
        expected = logits(theirs, inputs)
        before = calls[0]
        found = logits(ours, inputs)
        assert calls[0] >= before + 2, kind  # a layer each
        assert (found - expected).norm() <= 5e-6 * expected.norm(), kind
    if name in NO_CACHE:
        return
    given = {"attention_mask": LEFT[1:], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for model in (theirs, ours):
        model.generation_config.eos_token_id = None
    assert torch.equal(theirs.generate(IDS[1:], **given), ours.generate(IDS[1:], **given))


@pytest.mark.parametrize("name", SAMPLE)
def test_attention_equals_sdpa(name, calls):
    check(name, calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SAMPLE])
def test_attention_equals_sdpa_in_other_architectures(name, calls):
    check(name, calls)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_unsupported_architectures_are_refused_by_name(name):
    theirs, ours = pair(name)
    for inputs in INPUTS.values():
        assert logits(theirs, inputs).isfinite().all()
        with pytest.raises((ValueError, AttributeError), match=f"^{REFUSED[name][1]}"):
            logits(ours, inputs)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_with_every_backend(name):
    """Heads of query and key have 24 numbers, those of value 16, and the config's `head_dim` is 8."""
    theirs, ours = pair(name)
    size = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    with torch.no_grad():
        assert make_mask("flex", **size, config=ours.config, dtype=torch.float32, device="cpu").backend.name == "flex"
        expected = logits(theirs, INPUTS["padded on the left"])
        for backend in ("flex", "sdpa", "dense"):
            ours.set_attn_implementation(f"{NAME}_{backend}")
            found = logits(ours, INPUTS["padded on the left"])
            assert (found - expected).norm() <= 5e-6 * expected.norm(), backend
        for backend in ("varlen", "xformers"):
            ours.to(torch.bfloat16).set_attn_implementation(f"{NAME}_{backend}")
            with pytest.raises(ValueError, match=r"\(flex, sdpa, dense\), got .*value heads of size 16 beside 24$"):
                logits(ours, {})
    pair.cache_clear()
