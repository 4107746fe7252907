"""Tokens made with our attention are those made with SDPA: caches of all kinds, proposals, beams, padding."""

import copy
import functools

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from unsloth_puzzles.attention.models import NAME, register

register()
SMALL = {
    "vocab_size": 16, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
MODELS = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}),
    "Mistral, window": (MistralForCausalLM, MistralConfig, WINDOW),
    "Gemma 3, window": (
        Gemma3ForCausalLM, Gemma3TextConfig, {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Qwen 2, window": (Qwen2ForCausalLM, Qwen2Config, {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
}  # fmt: skip
# Gemma has both kinds of layers; the others are the slow tier's.
SAMPLED = [name if "Gemma" in name else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
# What `generate` is given, or functions of the model that give it.
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "drawn beams": {"num_beams": 2, "do_sample": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": lambda model: assistant(model.config._attn_implementation)},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "parts of the prompt": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 1.5},
}
ONE = ("prompt look-up", "an assistant")  # row at a time
REPEATS = torch.tensor([[3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4, 5]])  # look-up proposes, and some of it is rejected


@functools.cache
def model_of(name):
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**SMALL, **options)).eval()


def assistant(implementation):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    model.set_attn_implementation(implementation)
    return model


def generate(model, implementation, mode, padded):
    model.set_attn_implementation(implementation)
    ids = REPEATS if mode in ONE else torch.cat([REPEATS, REPEATS.flip(1)])
    attention_mask = torch.ones_like(ids)
    attention_mask[-1, : 3 * padded] = 0
    options = {name: value(model) if callable(value) else value for name, value in MODES[mode].items()}
    torch.manual_seed(2)
    return model.generate(ids, attention_mask=attention_mask, max_new_tokens=14, **{"do_sample": False, **options})


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAMPLED)
def test_generated_tokens_equal_those_of_sdpa(name, mode, padded):
    model = model_of(name)
    expected = generate(model, "sdpa", mode, padded)
    assert expected.shape[1] == 27
    assert torch.equal(generate(model, NAME, mode, padded), expected)
    # A static cache of windows alone is filled by the prompt here, and then ends with the last query.
    if mode == "a static cache" and "Mistral" not in name:
        with pytest.raises(
            ValueError,
            match=r"^past_key_values must .* got 13 queries from position 0 on for 26 keys.*dense take any mask$",
        ):
            generate(model, f"{NAME}_flex", mode, padded)
    elif mode in ("greedy", "prompt look-up", "a static cache"):
        assert torch.equal(generate(model, f"{NAME}_flex", mode, padded), expected)


@pytest.mark.parametrize("name", MODELS)
def test_generation_continues_from_a_cache(name):
    """A turn, then another, with the cache of the first."""
    model, found = model_of(name), []
    for implementation in ("sdpa", NAME, f"{NAME}_flex"):
        model.set_attn_implementation(implementation)
        given = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        first = model.generate(REPEATS, **given)
        more = torch.cat([first.sequences, REPEATS[:, :5]], dim=1)
        given |= {"attention_mask": torch.ones_like(more), "past_key_values": copy.deepcopy(first.past_key_values)}
        found.append(model.generate(more, **given).sequences)
    assert found[0].shape == (1, 26) and torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


@torch.no_grad()
def test_mask_without_the_cached_positions_is_refused():
    """transformers takes the positions that the mask lacks for padding: not what a user means, but the same here."""
    model, found = model_of("Llama"), []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        cache = model(REPEATS, use_cache=True).past_key_values
        found.append(model(REPEATS[:, :2], past_key_values=cache, attention_mask=torch.ones(1, 2)).logits)
    assert (found[1] - found[0]).norm() <= 2e-6 * found[0].norm()
    model.set_attn_implementation(f"{NAME}_flex")
    cache = model(REPEATS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^attention_mask must have 15 positions, cached ones included, got 2"):
        model(REPEATS[:, :2], past_key_values=cache, attention_mask=torch.ones(1, 2))
