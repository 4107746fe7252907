"""Trainers, models and adapters that would not be what was compiled: each refused by name, and nothing exchanged."""

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.compiled.qlora import compile_qlora


@pytest.fixture(scope="module")
def model():
    return with_adapters(nf4_llama(layers=1))


def trainer(folder, model=None, **given):
    options = {name: given.pop(name) for name in ("torch_compile", "torch_compile_backend") if name in given}
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to=[], **options), **given)


def test_a_model_that_the_trainer_makes_anew(tmp_path, model):
    with pytest.raises(ValueError, match=r"^model_init must be None, got a function"):
        compile_qlora(trainer(tmp_path, model_init=lambda: model))


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"torch_compile_backend": "eager"}], ids=str)
def test_a_trainer_that_compiles_the_model(tmp_path, model, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments overwrite, for good
    with pytest.raises(ValueError, match=r"^torch_compile must be False, got True"):
        compile_qlora(trainer(tmp_path, model, **options))


def test_a_trainer_after_one_that_compiled(tmp_path, model, monkeypatch):
    """Its arguments have left the backend in the environment."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match=r"^torch_compile must be False, got False \(accelerate's .*: INDUCTOR\)"):
            compile_qlora(trainer(tmp_path, model))
    finally:
        AcceleratorState._reset_state(True)


def test_a_model_that_is_compiled():
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
def test_a_forward_that_would_not_be_called(model, name):
    part = model.get_base_model().model.get_submodule(name)
    part.forward = lambda *args, **kwargs: args[0]
    try:
        with pytest.raises(ValueError, match=rf"^model: {type(part).__name__} has a forward of its own"):
            compile_qlora(model)
    finally:
        del part.forward


def test_a_vision_tower(model, monkeypatch):
    monkeypatch.setattr(model.get_base_model().config, "vision_config", {"depth": 2}, raising=False)
    with pytest.raises(TypeError, match=r"^model: LlamaForCausalLM has a vision or audio tower"):
        compile_qlora(model)
