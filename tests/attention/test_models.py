"""Under transformers' models: the logits of their own attention, with windows, soft caps, packing, padding, a cache."""

import copy
import functools

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.attention.conftest import make_batch
from unsloth_puzzles.attention import BACKENDS, flex
from unsloth_puzzles.attention.models import NAME, attention_forward, implementation, make_mask, register
from unsloth_puzzles.attention.pattern import Pattern

NAMES = register()
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
MODELS = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}, "sdpa"),
    "Mistral, window": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}, "sdpa"),
    # Every other layer has the window; transformers' sdpa leaves the soft cap out, so its eager attention is compared.
    "Gemma 2, soft cap": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 10},
        "eager",
    ),
}
LENGTH = 40
PACKED = torch.cat([torch.arange(11), torch.arange(20), torch.arange(9)])[None].expand(3, -1)
LEFT = (torch.arange(LENGTH) >= torch.tensor([[0], [7], [1]])).long()
RIGHT = (torch.arange(LENGTH) < torch.tensor([[40], [31], [39]])).long()
INPUTS = {
    "plain": {},
    "packed": {"position_ids": PACKED},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": RIGHT},
}


@functools.cache
def model_of(name):
    kind, config, options, _ = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**SMALL, **options)).eval()


def ids(rows=3, length=LENGTH):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, implementation, inputs):
    model.set_attn_implementation(implementation)
    found = model(ids().to(model.device), use_cache=False, **inputs).logits
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found


@pytest.mark.parametrize("backend", ["auto", "flex", "sdpa", "dense"])
@torch.no_grad()
def test_a_config_without_a_window_makes_a_mask_that_no_layer_uses(backend):
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **experts)).eval()
    assert model.config.sliding_window == 0
    expected = logits(model, "sdpa", {})
    torch.testing.assert_close(logits(model, f"{NAME}_{backend}" if backend != "auto" else NAME, {}), expected)
    model.config.layer_types = ["sliding_attention"] * 2  # now layers ask for it
    if backend == "flex":
        for layer in model.model.layers:
            layer.attention_type = layer.self_attn.layer_type = "sliding_attention"
        with pytest.raises(ValueError):
            logits(model, f"{NAME}_{backend}", {})


@pytest.mark.parametrize("backend", ["auto", "flex", "sdpa", "dense"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name, inputs, backend):
    model, theirs = model_of(name), MODELS[name][3]
    ours = NAME if backend == "auto" else f"{NAME}_{backend}"
    if backend == "sdpa" and theirs == "eager":
        own, newer = (
            r"^backend must be .*: sdpa cannot do a soft cap \(2\.0\)",
            "^Gemma2ForCausalLM does not support .*scaled_dot",
        )
        with pytest.raises(ValueError, match=f"{own}|{newer}"):  # newer releases refuse any name with sdpa in it
            logits(model, ours, INPUTS[inputs])
        return
    expected = logits(model, theirs, INPUTS[inputs])
    assert (logits(model, ours, INPUTS[inputs]) - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("name", ["Llama", "Mistral, window"])
def test_gradients_equal_those_of_transformers(name):
    model, found = model_of(name), []
    for kind in (MODELS[name][3], NAME):
        model.zero_grad()
        logits(model, kind, INPUTS["packed"]).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flash", "flex", "xformers", "sdpa"])
@pytest.mark.parametrize("inputs", ["packed", "padded on the left"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_error_on_a_gpu_is_at_most_that_of_transformers(name, inputs, backend):
    """Logits, and gradients of all parameters."""
    if backend != "auto" and (reason := BACKENDS[backend].missing(torch.device("cuda"))):
        pytest.skip(f"{backend}: {reason}")
    theirs = MODELS[name][3]
    exact, model = (copy.deepcopy(model_of(name)).to("cuda", dtype) for dtype in (torch.float32, torch.bfloat16))

    def outcome(of, attention):
        of.zero_grad()
        found = logits(of, attention, {name: tensor.cuda() for name, tensor in INPUTS[inputs].items()})
        found.float().square().mean().backward()
        return found.detach().float(), torch.cat([p.grad.flatten().float() for p in of.parameters()])

    if theirs == "eager" and backend in ("flash", "xformers", "sdpa"):
        with pytest.raises(ValueError, match=rf"^backend must be .*: {backend} cannot do a soft cap \(2\.0\)"):
            outcome(model, implementation(backend))
        return
    found, plain, true = outcome(model, implementation(backend)), outcome(model, theirs), outcome(exact, theirs)
    for mine, other, right in zip(found, plain, true, strict=True):
        assert (mine - right).norm() <= 1.2 * (other - right).norm()


@pytest.mark.parametrize("name", ["Llama", "Mistral, window"])
def test_generation_with_a_cache_and_padding(name):
    model, made = model_of(name), []
    for kind in (MODELS[name][3], NAME):
        model.set_attn_implementation(kind)
        tokens = {"input_ids": ids(2, 12), "attention_mask": LEFT[1:, :12]}
        made.append(model.generate(**tokens, max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*made) and made[0].shape == (2, 24)


@torch.no_grad()
def test_bidirectional_model():
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=64, **options), add_pooling_layer=False).eval()
    found = []
    for kind in ("sdpa", NAME):
        model.set_attn_implementation(kind)
        hidden = model(ids(), attention_mask=RIGHT).last_hidden_state
        found.append(hidden[RIGHT.bool()])
    assert (found[1] - found[0]).norm() <= 2e-6 * found[0].norm()


def mask(backend="auto", **changed):
    config = model_of("Llama").config
    given = {"batch_size": 1, "q_length": 4, "kv_length": 4, "dtype": torch.float32, "device": "cpu", "config": config}
    return make_mask(backend, **{**given, **changed})


@torch.no_grad()
def test_padding_between_tokens_is_dense_or_refused():
    """What follows it sees what came before."""
    model = model_of("Llama")
    gap = torch.ones(3, LENGTH, dtype=torch.long)
    gap[1, 5:9] = 0
    expected = logits(model, "sdpa", {"attention_mask": gap})
    for backend in ("auto", "sdpa", "dense"):
        found = logits(model, implementation(backend), {"attention_mask": gap})
        assert (found - expected).norm() <= 2e-6 * expected.norm()
    with pytest.raises(
        ValueError,
        match=r"^attention_mask must have padding .* zeros between ones; backends sdpa and dense take any mask$",
    ):
        logits(model, implementation("flex"), {"attention_mask": gap})


def test_packing_by_lengths_without_position_ids_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=NAME)).eval()
    lengths = {"cu_seq_lens_q": torch.tensor([0, 11, 31, 40], dtype=torch.int32), "max_length_q": 20}
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q must come with position_ids"):
        model(ids(), **lengths)
    packed = {"position_ids": PACKED, "use_cache": False}
    assert torch.equal(model(ids(), **packed, **lengths).logits, model(ids(), **packed).logits)


@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_flex_attention_fit_a_t4(monkeypatch, head_size, dtype):
    batch = make_batch(8, head_size=head_size, dtype=dtype, device=torch.device("cuda"))
    monkeypatch.setattr(flex, "capability", lambda device: 75)
    if (head_size, dtype) == (256, torch.float32):  # 16 rows of it are too many
        assert "shared memory" in BACKENDS["flex"].refuses(Pattern(), batch)
        return
    tiles = flex.kernel_options(batch)
    assert all(tiles[name] >= 16 for name in flex._TILES)  # the least that `tl.dot` multiplies
    assert max(tiles[name] for name in flex._TILES) * 4 * head_size * dtype.itemsize <= 32 * 1024
    assert (tiles["num_stages"], tiles["num_warps"]) == (1, 4)
    monkeypatch.setattr(flex, "capability", lambda device: 90)
    assert flex.kernel_options(batch) == {"BACKEND": "TRITON"}


@pytest.mark.parametrize(("head_size", "value_size"), [(192, 128), (128, 192), (256, 256)])
def test_tiles_of_large_float32_heads_fit_newer_gpus(monkeypatch, head_size, value_size):
    monkeypatch.setattr(flex, "capability", lambda device: 80)

    def options(dtype):
        changed = {"head_size": head_size, "value_head_size": value_size, "device": torch.device("cuda")}
        return flex.kernel_options(make_batch(8, dtype=dtype, **changed))

    tiles = options(torch.float32)
    assert {tiles[name] for name in flex._TILES} == {16} and tiles["num_stages"] == 1
    assert options(torch.bfloat16) == {"BACKEND": "TRITON"}


def test_static_cache_becomes_a_dense_mask():
    given = {"q_length": 1, "q_offset": 5, "kv_length": 32}
    assert mask(**given)[0, 0, 0].tolist() == [True] * 6 + [False] * 26
    with pytest.raises(
        ValueError, match=r"^past_key_values must .* got 1 queries from position 5 on for 32 keys.*dense take any mask$"
    ):
        mask("flex", **given)


@pytest.mark.parametrize("name, value", [("dropout", 0.1), ("s_aux", torch.ones(4)), ("position_bias", torch.ones(1))])
def test_unsupported_keywords_of_a_model_are_refused(name, value):
    query = torch.randn(1, 4, 4, 16)
    with pytest.raises(ValueError, match=f"^{name} must be left out"):
        attention_forward(None, query, query, query, mask(), **{name: value})
    with pytest.raises(ValueError, match=r"^attention_mask must be 2-D for the model.*, got shape \(1, 4\)"):
        attention_forward(None, query, query, query, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"^softcap must be the config's None, got 3\.0"):
        attention_forward(None, query, query, query, mask(), softcap=3.0)


def test_every_registered_name_can_be_set_on_a_model():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for name in NAMES:
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
