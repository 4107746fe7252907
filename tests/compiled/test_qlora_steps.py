"""The steps of compile_qlora: what they change and restore, in which order, and what is refused before."""

import json
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as fx_config

from benchmarks.models import random_llama, tiny_llama_config
from tests.compiled.models import nf4_llama, with_adapters
from tests.compiled.training_step import batch, make_model
from unsloth_puzzles.compiled import layers, qlora
from unsloth_puzzles.compiled.qlora import compile_qlora


def test_reentrant_checkpointing_warns():
    model = make_model(use_reentrant=True)
    with pytest.warns(UserWarning, match=r"^use_reentrant: was True"):
        compile_qlora(model).undo()


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"^model must be a PreTrainedModel, .* got a Linear"):
        compile_qlora(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^model must have adapters that are trained, got none; add them with peft\."):
        compile_qlora(nf4_llama())
    with pytest.raises(ValueError, match=r"^model must have bitsandbytes Linear4bit layers"):
        compile_qlora(with_adapters(random_llama(tiny_llama_config(vocab_size=64), "cpu", torch.float32)))
    model = make_model()
    for budget in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"^activation_memory_budget must be a number above 0, at most 1, got"):
            compile_qlora(model, activation_memory_budget=budget)
    hooked = make_model()
    add_hook_to_module(hooked.get_base_model().model.layers[1], ModelHook())
    with pytest.raises(ValueError, match=r"^model must be on one GPU, got layers with accelerate's hooks"):
        compile_qlora(hooked)
    with pytest.raises(TypeError, match=r"^model must be one model on one GPU, got an nn\.DataParallel"):
        compile_qlora(torch.nn.DataParallel(model))
    before, classes = model.get_base_model().config._attn_implementation, [type(module) for module in model.modules()]
    for backend in ("fast", "xformers"):
        with pytest.raises(ValueError, match=rf"^attention must be one of 'auto', 'flash', 'flex'.* got '{backend}'"):
            compile_qlora(model, attention=backend)
    assert model.get_base_model().config._attn_implementation == before
    assert [type(module) for module in model.modules()] == classes


def test_loaded_adapters_must_be_trainable(tmp_path):
    with_adapters(nf4_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refusal:
        compile_qlora(PeftModel.from_pretrained(nf4_llama(), tmp_path))
    assert str(refusal.value) == (
        "model must have adapters that are trained, got frozen ones; load them with is_trainable=True"
    )
    compile_qlora(PeftModel.from_pretrained(nf4_llama(), tmp_path, is_trainable=True)).undo()


def test_kv_cache_is_off_by_default_and_config_is_unchanged(tmp_path):
    """Calls that do not pass `use_cache` have no cache. The config can be saved while the model is compiled."""
    model, ids = make_model(), batch(7)["input_ids"]
    config = model.get_base_model().config

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def has_cache():
        calls = (model(ids), model(ids, use_cache=False), model(ids, use_cache=True))
        return [call.past_key_values is not None for call in calls]

    config.use_cache = True
    with pytest.warns(UserWarning, match=r"^use_cache: False until undo"):
        compiled = compile_qlora(model)
    assert has_cache() == [False, False, True]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is config.use_cache is True
    compiled.undo()
    assert has_cache() == [True, False, True]
    config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compile_qlora(model).undo()


def test_eager_rounding_reaches_every_step(monkeypatch):
    model, asked = make_model(), []
    undo = lambda: None  # noqa: E731
    monkeypatch.setattr(qlora, "scale_low_rank", lambda model, rounding: asked.append(rounding) or undo)
    monkeypatch.setattr(qlora, "fuse_swiglu", lambda model, rounding: asked.append(rounding) or undo)
    made = lambda forward, name, options: asked.extend(  # noqa: E731
        [options["emulate_precision_casts"], not options["epilogue_fusion"]]
    )
    monkeypatch.setattr(layers, "Variants", made)
    for options, expected in (({}, True), ({"eager_rounding": False}, False)):
        compile_qlora(model, **options).undo()
        assert len(asked) >= 4 and set(asked) == {expected}
        asked.clear()


def test_steps_are_named_in_order_and_undone_in_reverse_order(monkeypatch):
    model, undone = make_model(), []
    monkeypatch.setattr(qlora, "scale_low_rank", lambda *_: lambda: undone.append("LoRA layers"))
    monkeypatch.setattr(qlora, "fuse_swiglu", lambda *_: lambda: undone.append("gated MLPs"))
    compiled = compile_qlora(model)
    assert [name.partition(":")[0] for name in compiled.steps] == [
        "NF4 linears", "LoRA layers", "attentions", "gated MLPs", "NF4 weights", "causal LM", "backbone", "backbone",
        "backbone", "process", "decoder layers", "final norm", "decoder layers",
    ]  # fmt: skip
    compiled.undo()
    compiled.undo()
    assert undone == ["gated MLPs", "LoRA layers"]


def test_steps_before_one_that_fails_are_undone(monkeypatch):
    model = make_model()
    before = [type(one) for one in (*model.modules(), *model.parameters())]
    budget, config = functorch_config.activation_memory_budget, model.get_base_model().config
    attention = config._attn_implementation
    monkeypatch.setattr(qlora, "checkpoint_inputs", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile_qlora(model, activation_memory_budget=0.7)
    assert [type(one) for one in (*model.modules(), *model.parameters())] == before
    assert (functorch_config.activation_memory_budget, config._attn_implementation) == (budget, attention)
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_exchanged_classes_are_those_of_the_table():
    model = make_model()
    parts = [*model.modules(), *model.parameters()]
    before = [type(part) for part in parts]
    with compile_qlora(model):
        exchanged = {
            (old, type(part).__name__) for old, part in zip(before, parts, strict=True) if type(part) is not old
        }
    assert {(old.__module__.partition(".")[0], old.__name__, new) for old, new in exchanged} == {
        ("bitsandbytes", "Linear4bit", "Linear4bit"),
        ("peft", "Linear4bit", "LowRankScaledLora"),
        ("transformers", "LlamaAttention", "SharedInputLlamaAttention"),
        ("transformers", "LlamaMLP", "FusedLlamaMLP"),
        ("bitsandbytes", "Params4bit", "Params4bit"),
        ("transformers", "LlamaDecoderLayer", "LlamaDecoderLayer"),
        ("transformers", "LlamaRMSNorm", "CompiledLlamaRMSNorm"),
    }


def test_dropout_sets_activation_memory_budget_to_one():
    """Below a budget of 1 the compiler may recompute random numbers, which are others then."""
    model, budget = with_adapters(nf4_llama(), lora_dropout=0.5), functorch_config.activation_memory_budget
    with pytest.warns(UserWarning, match=r"^activation_memory_budget: is 1\.0, not 0\.9"):
        compiled = compile_qlora(model)
    assert functorch_config.activation_memory_budget == 1.0
    compiled.undo()
    assert functorch_config.activation_memory_budget == budget
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compile_qlora(model, activation_memory_budget=1.0).undo()


def test_process_settings_are_restored_in_any_order():
    def settings():
        budget, duck_shape = functorch_config.activation_memory_budget, fx_config.use_duck_shape
        return budget, duck_shape, torch._C._is_multithreading_enabled()

    before, models = settings(), [make_model() for _ in range(3)]
    first, second = (compile_qlora(model, activation_memory_budget=0.5) for model in models[:2])
    with pytest.raises(ValueError, match=r"^activation_memory_budget must be 0\.5, that of a model .* got 0\.9"):
        compile_qlora(models[2])
    assert type(models[2].get_base_model().model.layers[0].mlp).__name__ == "LlamaMLP"
    first.undo()
    assert settings() == (0.5, False, False)
    second.undo()
    assert settings() == before
    compile_qlora(models[2]).undo()
    assert settings() == before
