"""The recipes: right architecture, really quantised, the same for a seed, honest about where weights come from."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import models
from benchmarks.models import llama_1b_config, load_llama, random_llama, random_nf4_llama, tiny_llama_config
from unsloth_puzzles.bench.text import paragraphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_1b_architecture_is_that_of_llama_3_2():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_1b_config())
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400  # as published
    assert model.lm_head.weight is model.model.embed_tokens.weight
    block = model.model.layers[0]
    assert block.self_attn.k_proj.weight.shape == (512, 2048) and block.mlp.down_proj.weight.shape == (2048, 8192)


def test_random_weights_are_really_quantised_by_bitsandbytes():
    config = tiny_llama_config()
    model = random_nf4_llama(config, DEVICE, torch.float32, seed=5)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * config.num_hidden_layers
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)
        assert layer.compute_dtype == torch.float32 and layer.weight.device.type == DEVICE
    weight = bnb.functional.dequantize_4bit(layers[0].weight, layers[0].weight.quant_state)
    assert 0.5 * config.initializer_range < weight.std() < 1.5 * config.initializer_range
    assert model.is_loaded_in_4bit and model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert model.train()(torch.tensor([[1, 2, 3]], device=DEVICE)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_decides_the_weights_and_leaves_the_generator_alone(dtype):
    torch.manual_seed(0)
    first = torch.rand(2)
    torch.manual_seed(0)
    one, same, other = (
        random_nf4_llama(tiny_llama_config(), DEVICE, dtype, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(2), first) and torch.get_default_dtype() == torch.float32
    assert one.keys() == same.keys() and all(torch.equal(one[key], same[key]) for key in one)
    key = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(one[key], other[key])
    assert one["model.norm.weight"].dtype == dtype


def test_a_local_directory_gives_real_weights(tmp_path):
    original = LlamaForCausalLM(tiny_llama_config())
    original.save_pretrained(tmp_path)
    model, provenance = load_llama(str(tmp_path), device=DEVICE, dtype=torch.float32)
    assert provenance == f"real weights, {tmp_path}"
    assert torch.equal(model.model.embed_tokens.weight.cpu(), original.model.embed_tokens.weight)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_the_same_directory_gives_the_weights_as_they_are(tmp_path):
    original = random_llama(tiny_llama_config(), "cpu", seed=4)
    original.save_pretrained(tmp_path)
    model, provenance = load_llama(str(tmp_path), device=DEVICE, dtype=torch.float32, four_bit=False)
    assert provenance == f"real weights, {tmp_path}" and model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in original.named_parameters():
        assert torch.equal(model.get_parameter(name).cpu(), weight), name


def test_a_seed_decides_the_weights_that_are_not_quantised():
    state = torch.get_rng_state()
    one, same, other = (random_llama(tiny_llama_config(), DEVICE, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    with pytest.warns(UserWarning, match="^RANDOM WEIGHTS, because no/such directory is not available: "):
        fallback, provenance = load_llama(
            "no/such directory", device=DEVICE, dtype=torch.float32, config=tiny_llama_config(), seed=1, four_bit=False
        )
    assert provenance == "random weights, seed 1"
    assert torch.equal(fallback.get_parameter(name), one.get_parameter(name))


@pytest.mark.parametrize("name", ["no/such directory", "unsloth/Llama-3.2-1B", None])
def test_no_weights_is_said_aloud(name, monkeypatch):
    models.hub_refuses.cache_clear()
    monkeypatch.setattr(models.constants, "ENDPOINT", "http://localhost:9")  # nobody listens there
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: None)
    with pytest.warns(UserWarning, match="^RANDOM WEIGHTS, because .* is not available: ") as caught:
        model, provenance = load_llama(name, device=DEVICE, dtype=torch.float32, config=tiny_llama_config(), seed=3)
    assert (name or models.MIRROR) in str(caught[0].message)
    assert provenance == "random weights, seed 3"
    asked = models.hub_refuses.cache_info().misses
    with pytest.warns(UserWarning, match="^RANDOM WEIGHTS, because .* is not available: "):
        load_llama(name, device=DEVICE, dtype=torch.float32, config=tiny_llama_config(), seed=3)
    assert models.hub_refuses.cache_info().misses == asked  # the hub is asked once a process
    models.hub_refuses.cache_clear()
    expected = random_nf4_llama(tiny_llama_config(), DEVICE, torch.float32, seed=3)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_offline_text_is_english_prose():
    found = paragraphs()
    assert sum(map(len, found)) > 100_000 and len(set(found)) == len(found) and paragraphs() is found
    words = " ".join(found).lower().split()
    assert 0.03 < words.count("the") / len(words) < 0.12
    assert all(len(text) >= 100 and "\n" not in text for text in found)
    assert not any(mark in text for text in found for mark in (">>>", "::="))
    with pytest.raises(ValueError, match="min_characters must be at least 1, got 0"):
        paragraphs(0)
