"""What transformers' layers hand to an attention function is honoured or refused by name, by every backend."""

import ast
import pathlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, masking_utils

from tests.attention.conftest import draw, make_batch, sees
from unsloth_puzzles.attention.models import (
    LENGTHS,
    NAME,
    REFUSED,
    attention_forward,
    implementation,
    make_mask,
    register,
)
from unsloth_puzzles.attention.pattern import Pattern

BACKENDS = ("auto", "flex", "sdpa", "dense")
LENGTH = 12
HONOURED = {"query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "is_causal", "sliding_window"}
# Known from the mask (positions), or of flash attention's backward alone.
WITHOUT_EFFECT = {"position_ids", "deterministic"}


def mask_of(backend, function=masking_utils.causal_mask_function, **changed):
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **changed)
    return make_mask(
        backend, batch_size=2, q_length=LENGTH, kv_length=LENGTH, mask_function=function, config=config,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


def expected(query, key, value, pattern=None, mask=None, scaling=None):
    """In float64: (batch, length, heads, head size)."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    pattern = pattern or Pattern()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if pattern.soft_cap:
        scores = pattern.soft_cap * (scores / pattern.soft_cap).tanh()
    seen = sees(pattern, make_batch(key.shape[2], query.shape[2]))[:, None] if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    return (scores.softmax(-1) @ value).transpose(1, 2)


def near(found, exact):
    return (found - exact).norm() <= 1e-6 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_causality_and_window_of_a_layer_are_honoured(backend):
    data = draw(LENGTH)

    def call(mask, module=None, **given):
        return attention_forward(module, *data, mask, backend=backend, **given)[0]

    assert near(call(mask_of(backend), scaling=0.7), expected(*data, scaling=0.7))
    assert near(call(mask_of(backend), dropout=0.0, is_causal=True), expected(*data))
    window = mask_of(backend, masking_utils.sliding_window_causal_mask_function(3))
    assert near(call(window, sliding_window=3), expected(*data, Pattern(window=3)))
    with pytest.raises(ValueError, match=r"^sliding_window must be the mask's 3, got 4$"):
        call(window, sliding_window=4)
    with pytest.raises(ValueError, match=r"^sliding_window must be the mask's None, got 4$"):
        call(mask_of(backend), sliding_window=4)
    with pytest.raises(ValueError, match=r"^is_causal must be the mask's True, got False$"):
        call(mask_of(backend), is_causal=False)
    # Without a mask the layer says by an argument, else by its module, whether queries see later keys.
    everything = Pattern(causal=False)
    for causal, module in ((True, False), (False, True), (None, True), (None, False)):
        found = call(None, SimpleNamespace(is_causal=module), is_causal=causal)
        assert near(found, expected(*data, Pattern() if (module if causal is None else causal) else everything))
    assert near(call(None), expected(*data))  # a module that does not say is causal, as with transformers' SDPA
    assert near(call(None, sliding_window=3), expected(*data, Pattern(window=3)))
    with pytest.raises(ValueError, match=r"^sliding_window must be left out where queries see later keys, got 3$"):
        call(None, is_causal=False, sliding_window=3)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_of_one_query_without_a_mask(backend):
    data = draw(LENGTH, 1)
    assert near(attention_forward(None, *data, None, backend=backend)[0], expected(*data))
    found = attention_forward(None, *data, None, backend=backend, sliding_window=3)[0]
    assert near(found, expected(*data, Pattern(window=3)))
    assert not near(found, expected(*data))


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_caps(backend):
    data, pattern = draw(LENGTH), Pattern(soft_cap=1.5)
    calls = {
        "a mask": lambda: attention_forward(None, *data, mask_of(backend, attn_logit_softcapping=1.5), softcap=1.5,
                                            backend=backend),
        "no mask": lambda: attention_forward(None, *data, None, softcap=1.5, backend=backend),
        "a tensor": lambda: attention_forward(None, *data, torch.ones(LENGTH, LENGTH).tril().bool()[None, None],
                                              softcap=1.5, backend=backend),
    }  # fmt: skip
    for kind, call in calls.items():
        if backend == "sdpa" or (backend, kind) == ("flex", "a tensor"):
            with pytest.raises(ValueError, match=rf"^backend must be .* got '{backend}': {backend} cannot do a "):
                call()
        else:
            assert near(call()[0], expected(*data, pattern)), kind
    with pytest.raises(ValueError, match=r"^softcap must be the config's None, got 1\.5"):
        attention_forward(None, *data, mask_of(backend), softcap=1.5, backend=backend)
    with pytest.raises(ValueError, match=r"^softcap must be the config's 1\.5, got None"):
        attention_forward(None, *data, mask_of(backend, attn_logit_softcapping=1.5), backend=backend)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("heads", [1, 4])
def test_4d_mask_of_a_model_is_applied_or_refused(heads, dtype, backend):
    data = draw(LENGTH, 5)
    mask = torch.rand(2, heads, 5, LENGTH, generator=torch.Generator().manual_seed(2))
    mask = mask > 0.4 if dtype == torch.bool else 5 * mask
    if backend == "flex":
        with pytest.raises(
            ValueError, match=r"^backend must be .*\(sdpa, dense\), got 'flex': flex cannot do a 4-D mask$"
        ):
            attention_forward(None, *data, mask, backend=backend)
        return
    found = attention_forward(None, *data, mask, is_causal=True, backend=backend)[0]
    assert near(found, expected(*data, mask=mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["a mask", "no mask", "a tensor"])
def test_unsupported_arguments_of_a_layer_are_refused(kind, backend):
    data = draw(LENGTH)
    mask = {"a mask": mask_of(backend), "no mask": None, "a tensor": torch.ones(1, 1, LENGTH, LENGTH).bool()}[kind]
    for name in ("dropout", *REFUSED):
        given = {"dropout": 0.1, "output_attentions": True}.get(name, torch.ones(4))
        with pytest.raises(ValueError, match=f"^{name} must be left out with attn_implementation="):
            attention_forward(None, *data, mask, backend=backend, **{name: given})
    starts = torch.tensor([0, 4, LENGTH])
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q must come with position_ids"):
        attention_forward(None, *data, mask, backend=backend, cu_seq_lens_q=starts)
    with pytest.raises(
        ValueError, match=r"^attention_mask must be of bool or of a floating dtype in 4-D, got torch\.in"
    ):
        attention_forward(None, *data, torch.ones(1, 1, LENGTH, LENGTH).long(), backend=backend)
    for wrong in (torch.ones(2, LENGTH), "causal"):
        with pytest.raises(ValueError, match=r"^attention_mask must be 2-D for the model, 4-D for its layers.*, got "):
            attention_forward(None, *data, wrong, backend=backend)


def test_lengths_that_differ_from_the_mask_are_refused():
    """As from a cache that was cut, or that holds more than it says."""
    query, key, value = draw(LENGTH)
    with pytest.raises(
        ValueError, match=r"^attention_mask must be made for \(12, 11\) queries and keys, got one for \(12, 12\)"
    ):
        attention_forward(None, query, key[:, :, 1:], value[:, :, 1:], mask_of("auto"))
    with pytest.raises(ValueError, match=r"^attention_mask must be given for 5 causal queries and 12 keys, got None"):
        attention_forward(None, query[:, :, :5], key, value, None)


def test_one_mask_serves_layers_with_different_heads():
    """In heads and their sizes, and in whether a checkpoint computes without gradients first."""
    mask = mask_of("auto")
    for heads, kv_heads, size in ((4, 2, 16), (3, 3, 20), (9, 3, 8)):
        data = draw(LENGTH, heads=heads, kv_heads=kv_heads, head_size=size)
        assert near(attention_forward(None, *data, mask)[0], expected(*data))
    capped = mask_of("auto", attn_logit_softcapping=1.5)
    data = [t.requires_grad_() for t in draw(LENGTH)]
    with torch.no_grad():
        attention_forward(None, *data, capped, softcap=1.5)
    found = torch.autograd.grad(attention_forward(None, *data, capped, softcap=1.5)[0].square().sum(), data)
    exact = torch.autograd.grad(expected(*data, Pattern(soft_cap=1.5)).square().sum(), data)
    assert all(near(one, other) for one, other in zip(found, exact, strict=True))


def test_registered_names_load_a_model():
    names = register()
    assert names[:3] == ["unsloth_puzzles", "unsloth_puzzles_varlen", "unsloth_puzzles_flex"]
    assert names[1] == implementation("flash")
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    for name in names:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert model.config._attn_implementation == name


def test_output_attentions_is_refused():
    register()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        attn_implementation=NAME,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"^output_attentions must be left out"):
        model(torch.ones(1, 3, dtype=torch.long), output_attentions=True)


@pytest.mark.slow
def test_every_keyword_of_a_transformers_layer_is_known():
    """Every name that a model of this transformers hands to its attention function."""
    known = {*HONOURED, *WITHOUT_EFFECT, *REFUSED, *LENGTHS}
    found = {}
    for path in (pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "attention_interface":
                found |= {keyword.arg: path.name for keyword in node.keywords if keyword.arg}
    assert len(found) > 15
    assert {name: where for name, where in found.items() if name not in known} == {}
    assert set(HONOURED) <= set(attention_forward.__code__.co_varnames[: attention_forward.__code__.co_argcount])
