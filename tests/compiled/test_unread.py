"""A checkpointed layer's second run leaves out what only its output depends on, in layers that only add it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from tests.compiled.models import compiled_by, nf4_llama, nf4_model, with_adapters
from tests.compiled.training_step import assert_same, batch, step
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.compiled.swiglu import fuse_swiglu
from unsloth_puzzles.compiled.unread import added_mlp, is_unread, output_unread
from unsloth_puzzles.nf4.patch import patch_linear4bit

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(family, adapters=None, **options):
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return with_adapters(nf4_model(getattr(transformers, f"{family}ForCausalLM"), config), **(adapters or {}))


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("Llama", {}, "mlp"),
        ("Qwen3", {}, "mlp"),
        ("Granite", {"residual_multiplier": 0.22}, "mlp"),
        ("Cohere", {}, "mlp"),  # attention and MLP side by side
        ("Olmo2", {}, None),  # normalises the MLP's output
        ("Exaone4", {}, None),
        ("Phi3", {}, None),  # its MLP is not fused
    ],
)
def test_layers_that_only_add_their_mlp_are_known(family, options, expected):
    model = model_of(family, **options)
    layer = model.get_base_model().model.layers[0]
    assert added_mlp(layer) is None
    undo = fuse_swiglu(model, True)
    assert added_mlp(layer) == expected
    undo()


class Layer(torch.nn.Module):
    """A decoder layer of one's own, whose end is `end`."""

    def __init__(self, end):
        super().__init__()
        self.mlp, self.norm, self.gate = Fused(), torch.nn.RMSNorm(4), torch.nn.Linear(4, 4)
        self.number, self.end = torch.nn.Parameter(torch.tensor(0.7)), end
        self.frozen = torch.nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x):
        return self.end(self, x, self.mlp(self.norm(x)))


class Fused(torch.nn.Module):
    fuses_swiglu = True


ENDS = {
    "sum": (lambda layer, x, y: x + y, True),
    "in place": (lambda layer, x, y: x.clone().add_(y), True),
    "constant": (lambda layer, x, y: 0.3 * (x - 2 * y), True),
    "trained number": (lambda layer, x, y: x + layer.number * y, False),
    "gate": (lambda layer, x, y: x + layer.gate(x) * y, False),
    "detached gate": (lambda layer, x, y: x + y.detach().sigmoid() * x, False),
    "choice by size": (lambda layer, x, y: x + y * (y.abs() < 2), False),
    "detached norm": (lambda layer, x, y: x + y * (1 / y.detach().norm(dim=-1, keepdim=True)).clamp(max=1), False),
    "frozen number": (lambda layer, x, y: x + layer.frozen * y, False),  # it may be trained later
    "in float32": (lambda layer, x, y: (x.float() + y.float()).to(x.dtype), True),
    "gate of the input": (lambda layer, x, y: x + x.sigmoid() * y, False),
    "square": (lambda layer, x, y: x + y * y, False),
    "norm": (lambda layer, x, y: layer.norm(x + y), False),
    "norm in training": (lambda layer, x, y: layer.norm(x + y) if layer.training else x + y, False),
    "clamp in float16": (lambda layer, x, y: (x + y).clamp(-9, 9) if x.dtype == torch.float16 else x + y, False),
    "quotient": (lambda layer, x, y: x / y, False),
    "tuple": (lambda layer, x, y: (x + y,), False),
    "dropout": (lambda layer, x, y: x + torch.nn.functional.dropout(y, 0.5, layer.training), True),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("training", [False, True])
def test_only_sums_and_constant_factors_are_taken_for_adding(end, training, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)  # nor is the GPU's random state touched
    function, expected = ENDS[end]
    layer = Layer(function).train(training)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert added_mlp(layer) == ("mlp" if expected else None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["Llama", "Granite", "Olmo2"])
def test_checkpointed_gradients_match_uncompiled_model(family):
    model = checkpointed(model_of(family))
    with patch_linear4bit(model):
        expected = step(model, 24)
    with compiled_by("aot_eager") as options, compile_qlora(model, **options):
        assert_same(step(model, 24), expected)


def test_mlp_leaves_its_last_product_out_and_keeps_the_gradients():
    model = with_adapters(nf4_llama())
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 64, requires_grad=True)
    parameters = [x, *(one for one in mlp.parameters() if one.requires_grad)]
    fuse_swiglu(model, True)
    y, other = mlp(x), mlp(x, unread=True)
    assert other.shape == y.shape and other.dtype == y.dtype and not torch.allclose(other, y, rtol=0.1)
    slope = torch.randn_like(y)
    gradients, others = (torch.autograd.grad(one, parameters, slope) for one in (y, other))
    assert all(torch.equal(one, same) for one, same in zip(gradients, others, strict=True))


@pytest.mark.slow
def test_compiled_layer_dequantises_one_weight_less():
    model = checkpointed(model_of("Llama"))
    with compiled_by("inductor") as options, count_compilations() as counts, compile_qlora(model, **options):
        step(model, 24)
    again = next(one.operators for one in counts.captures if one.name == "LlamaDecoderLayer_again")
    assert (again["unsloth_puzzles.dequantize_nf4"], again["unsloth_puzzles.dequantize_nf4_again"]) == (6, 7)


def test_only_the_layer_named_is_unread_in_this_thread():
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with ThreadPoolExecutor(1) as threads, pytest.raises(ZeroDivisionError), output_unread(layer):
        assert is_unread(layer) and not is_unread(other) and not threads.submit(is_unread, layer).result()
        with output_unread(None):
            assert not is_unread(layer)
        assert is_unread(layer)
        raise ZeroDivisionError
    assert not is_unread(layer)


def compiled_forwards(counts):
    return {one.name for one in counts.captures if one.name.startswith("Llama")}


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_layers_of_one_class_that_differ_are_compiled_as_they_are():
    some = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "layers_to_transform": [0]}
    model = checkpointed(model_of("Llama", adapters=some))
    with patch_linear4bit(model):
        expected = step(model, 24)
    with compiled_by("aot_eager") as options, count_compilations() as counts, compile_qlora(model, **options):
        assert_same(step(model, 24), expected)
    assert {"LlamaDecoderLayer_again", "LlamaDecoderLayer"} <= compiled_forwards(counts)


def normalise(layer):
    forward = layer.forward

    def normalised(*args, **kwargs):
        y = forward(*args, **kwargs)
        return y / y.norm(dim=-1, keepdim=True)

    layer.forward = normalised


def hook(layer):
    layer.register_forward_hook(lambda layer, given, y: y / y.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("wrap", [normalise, hook])
@pytest.mark.filterwarnings("ignore:hooks")
def test_outputs_that_a_wrapper_reads_are_computed(wrap):
    """A forward or a hook that is put around a compiled layer's."""
    model = checkpointed(model_of("Llama"))
    layers = model.get_base_model().model.layers
    with compiled_by("aot_eager") as options, count_compilations() as counts, compile_qlora(model, **options):
        wrap(layers[0])
        found = step(model, 24)
        vars(layers[0]).pop("forward", None)
    assert {"LlamaDecoderLayer_again", "LlamaDecoderLayer"} <= compiled_forwards(counts)
    layers[0]._forward_hooks.clear()
    wrap(layers[0])
    with patch_linear4bit(model):
        assert_same(found, step(model, 24))


def test_evaluation_between_forward_and_backward_reads_its_output():
    model = checkpointed(model_of("Llama"))
    with torch.no_grad(), patch_linear4bit(model):
        expected = model(**batch(24)).loss
    with compiled_by("aot_eager") as options, compile_qlora(model, **options):
        loss = model(**batch(24)).loss
        with torch.no_grad():
            between = model(**batch(24)).loss
        loss.backward()
    for one in (loss, between):
        assert (one - expected).abs() <= 2e-6 * expected
