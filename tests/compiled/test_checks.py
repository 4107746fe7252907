"""Trainers, models and adapters that cannot be compiled are refused by name, before anything changes."""

import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from benchmarks.backprop.grpo import make_trainer, tiny_tokenizer, vowel_share
from tests.compiled.models import nf4_llama, nf4_model, traced_only, with_adapters
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer
from unsloth_puzzles.compiled.checks import draws, uses
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit


@pytest.fixture(scope="module")
def model():
    return with_adapters(nf4_llama(layers=1))


def trainer(folder, model=None, **given):
    options = {name: given.pop(name) for name in ("torch_compile", "torch_compile_backend") if name in given}
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to=[], **options), **given)


def test_trainer_with_model_init_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"^model_init must be None, got a function"):
        compile_qlora(trainer(tmp_path, model_init=lambda: model))


def test_grpo_trainer_is_refused_and_left_as_it_was(tmp_path):
    model = with_adapters(nf4_llama(layers=1))
    classes = [type(module) for module in model.modules()]
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "num_generations": 2}
    grpo = make_trainer(
        MemoryEfficientGRPOTrainer, model, tiny_tokenizer(), vowel_share, str(tmp_path),
        per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got a MemoryEfficientGRPOTrainer; .* without compile_qlora$"):
        compile_qlora(grpo)
    with pytest.raises(ValueError, match=r"pass that trainer if it is an SFTTrainer; others are not supported$"):
        compile_qlora(grpo.model)
    assert [type(module) for module in grpo.model.modules()] == classes


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"torch_compile_backend": "eager"}], ids=str)
def test_trainer_with_torch_compile_is_refused(tmp_path, model, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments overwrite, for good
    with pytest.raises(ValueError, match=r"^torch_compile must be False, got True"):
        compile_qlora(trainer(tmp_path, model, **options))


def test_trainer_after_one_with_torch_compile(tmp_path, model, monkeypatch):
    """Its arguments have left the backend in the environment."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match=r"^torch_compile must be False, got False \(accelerate's .*: INDUCTOR\)"):
            compile_qlora(trainer(tmp_path, model))
    finally:
        AcceleratorState._reset_state(True)


def test_compiled_model_is_refused():
    model = with_adapters(nf4_llama(layers=1))
    with pytest.raises(TypeError, match=r"^model must not be compiled, got what torch\.compile returns"):
        compile_qlora(torch.compile(model))
    base = model.get_base_model()
    for name in ("model.layers.0", "model.layers.0.mlp", "lm_head"):
        module = base.get_submodule(name)
        module.compile()
        with pytest.raises(ValueError, match=rf"^model must not be compiled, got one whose .*{name} is"):
            compile_qlora(model)
        module._compiled_call_impl = None
    base.model.layers[0] = torch.compile(base.model.layers[0])
    with pytest.raises(ValueError, match=r"^model must not be compiled, got one whose .*layers\.0 is"):
        compile_qlora(model)


@pytest.mark.parametrize("name", ["layers.0", "norm"])
def test_layer_with_its_own_forward_is_refused(model, name):
    part = model.get_base_model().model.get_submodule(name)
    part.forward = lambda *args, **kwargs: args[0]
    try:
        with pytest.raises(
            ValueError, match=rf"^model must have layers .* got a {type(part).__name__} with one of its"
        ):
            compile_qlora(model)
    finally:
        del part.forward


def test_vision_tower_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.get_base_model().config, "vision_config", {"depth": 2}, raising=False)
    with pytest.raises(TypeError, match=r"^model must be .* got LlamaForCausalLM, which has a vision or audio tower"):
        compile_qlora(model)


def test_linear_attention_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.get_base_model().config, "layer_types", ["linear_attention"], raising=False)
    with pytest.raises(ValueError, match=r"^layer_types must be full or .* got linear_attention in LlamaForCausalLM"):
        compile_qlora(model)


def test_cross_attention_is_refused(model, monkeypatch):
    def forward(self, hidden_states, cross_attention_states=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(type(model.get_base_model().model.layers[0]), "forward", forward)
    with pytest.raises(
        ValueError, match=r"^model must have .* got LlamaDecoderLayer \(cross_attention_states\) in LlamaForCausalLM"
    ):
        compile_qlora(model)


MIXTURES = {
    "qwen3_moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
}  # fmt: skip
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_on_routers_and_experts_are_refused(name):
    config, cls, options = MIXTURES[name]
    model = with_adapters(nf4_model(cls, config(**SMALL, **options)))
    before = {place: type(module) for place, module in model.named_modules()}
    message = (
        r"^target_parameters must be None in the decoder layers, got ParamWrapper at \S*layers\.0\.mlp\.\S+ for "
        r"'\w+' \(adapter 'default'\): .* name linear layers in target_modules"
    )
    with pytest.raises(ValueError, match=message):
        compile_qlora(model)
    assert before == {place: type(module) for place, module in model.named_modules()}


def test_target_parameters_in_a_layer_are_refused():
    config, cls, options = MIXTURES["qwen3_moe"]
    model = with_adapters(
        nf4_model(cls, config(**SMALL, **options)), target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]
    )
    with pytest.raises(ValueError, match=r"got ParamWrapper at \S*layers\.0\.mlp\.gate for 'weight'"):
        compile_qlora(model)


@pytest.mark.parametrize("target", ["lm_head.weight", pytest.param("embed_tokens.weight", marks=pytest.mark.slow)])
def test_adapter_on_a_parameter_outside_of_the_layers(target):
    """Embedding and head are not compiled with the layers: values and gradients are the uncompiled model's."""

    def step(model):
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids).loss
        parameters = [one for one in model.parameters() if one.requires_grad]
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    model = with_adapters(nf4_llama(layers=1), target_modules=["q_proj"], target_parameters=[target])
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
    with patch_linear4bit(model):
        expected = step(model)
    with traced_only(), compile_qlora(model):
        found = step(model)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() and other.norm() > 0


def test_position_ids_reach_layers_that_use_them():
    """Ministral 3 scales its queries by them."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = Ministral3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        rope_parameters={**rope, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4},
    )  # fmt: skip
    model = with_adapters(nf4_model(Ministral3ForCausalLM, config))
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        with patch_linear4bit(model):
            expected = [model(ids, position_ids=positions).logits for positions in (None, packed)]
        with traced_only(), compile_qlora(model, compile=False):
            found = [model(ids, position_ids=positions).logits for positions in (None, packed)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert (expected[0] - expected[1]).norm() > 1e-3 * expected[0].norm()


def test_draws_detects_every_kind_of_dropout():
    for kind in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        assert [draws([nn.Sequential(nn.Linear(2, 2), kind(p))]) for p in (0.0, 0.1)] == [False, True]
    for p in (0.0, 0.1):  # Seed-OSS, StarCoder 2 and Doge call the function
        layer = nn.Linear(2, 2)
        layer.residual_dropout = p
        assert draws([nn.Sequential(layer)]) == (p > 0)


def test_uses_detects_arguments_by_name_and_by_key():
    class Passes(nn.Module):
        def forward(self, x, **kwargs):
            return x

    class Named(nn.Module):
        def forward(self, x, position_ids=None):
            return x

    class Keyed(nn.Module):
        def forward(self, x, **kwargs):
            return x + kwargs["position_ids"]

    class Layer(Named):
        def __init__(self, below):
            super().__init__()
            self.below = nn.Sequential(below)

    assert [uses(Layer(kind()), "position_ids") for kind in (Passes, Named, Keyed)] == [False, True, True]
