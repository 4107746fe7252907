"""Adapters of a sharded model, saved, give the same logits over ordinary layers in one process."""

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import LlamaForCausalLM

from benchmarks.fsdp2.ranks import start_ranks
from benchmarks.models import random_nf4_llama, tiny_llama_config
from tests.fsdp2.save_on_two import CASES, base, logits_of
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.save import save_adapters
from unsloth_puzzles.nf4 import patch_linear4bit

NAMES = (*CASES, "LoRA, Trainer", "trained head, Trainer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and two have saved."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = tmp_path_factory.mktemp("saved")
        arguments = ("tests.fsdp2.save_on_two", str(found[ranks]))
        start_ranks(*arguments, ranks=ranks, timeout=300, TRITON_INTERPRET="1")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_match_one_process(folders, name):
    one, two = (torch.load(folders[ranks] / name / "rank0.pt") for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert (two["logits"] - one["logits"]).norm() < 1e-4 * one["logits"].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loaded_model_has_the_logits_of_the_sharded_one(folders, name):
    trained = [torch.load(folders[2] / name / f"rank{rank}.pt")["logits"] for rank in (0, 1)]
    model = PeftModel.from_pretrained(base(), folders[2] / name)
    with patch_linear4bit(model):
        loaded = logits_of(model)
    assert torch.equal(loaded, trained[0]) and torch.equal(loaded, trained[1])
    assert not torch.equal(loaded, logits_of(base()))
    assert logits_of(model.merge_and_unload()).isfinite().all()


def test_gloo_gathers_shards_of_a_gpu_mesh_on_the_cpu(tmp_path, mesh, monkeypatch):
    """Their functional all-gather on a GPU ends the process; a mesh of GPUs over a shard on the CPU stands for it."""
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32), config)
    of_gpus = DeviceMesh.from_group(distributed.group.WORLD, "cuda")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    for module in model.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            if one.requires_grad:
                meta = TensorMeta(one.shape, one.stride(), one.dtype)
                spec = DTensorSpec(of_gpus, (Shard(0),), meta)
                setattr(module, name, torch.nn.Parameter(DTensor(one.detach(), spec, requires_grad=False)))
    gathered_on, full_tensor = [], DTensor.full_tensor

    def gather(self):
        gathered_on.append(self.device_mesh.device_type)
        return full_tensor(self)

    monkeypatch.setattr(DTensor, "full_tensor", gather)
    save_adapters(model, tmp_path)
    assert gathered_on == ["cpu", "cpu"]
    loaded = PeftModel.from_pretrained(random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_model_must_have_adapters(tmp_path):
    with pytest.raises(TypeError, match="model must be a PeftModel, got Linear"):
        save_adapters(torch.nn.Linear(2, 2), tmp_path)


CONFIGS = {
    "LoRA": {},
    "LoRA with biases": {"bias": "all"},
    "embedding by LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [1, 5]},
    "tied and whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "DoRA": {"use_dora": True},
    "norm": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_that_is_trained_is_saved(name, tmp_path):
    config = tiny_llama_config(64, 1)
    model = random_nf4_llama(config, "cpu", torch.float32)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **CONFIGS[name]}), "one")
    if name != "some tokens":  # PEFT cannot save these beside another adapter
        model.add_adapter("two", LoraConfig(target_modules=["v_proj"], r=2))
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one))
    save_adapters(model, tmp_path)
    loaded = PeftModel.from_pretrained(random_nf4_llama(config, "cpu", torch.float32), tmp_path / "one")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_trained_parameters_that_are_not_saved_are_refused(tmp_path):
    model = get_peft_model(random_nf4_llama(tiny_llama_config(64, 1), "cpu"), LoraConfig(target_modules=["q_proj"]))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^model must train only what PEFT saves, got .*norm.weight, and 2 more"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


FROZEN = {
    "some tokens": {"trainable_token_indices": [1, 5]},
    "biases": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("name", FROZEN)
def test_adapters_that_are_not_active_or_frozen_are_saved(name, tmp_path):
    """As PEFT saves them for a model that is not packed."""
    config = tiny_llama_config(64, 1)
    config.attention_bias = True
    model = random_nf4_llama(config, "cpu", torch.float32)
    lora = {"target_modules": ["q_proj"], "r": 4, **FROZEN[name]}
    model = get_peft_model(model, LoraConfig(**lora), "one")
    model.add_adapter("two", LoraConfig(**{**lora, **({"bias": "none"} if "bias" in lora else {})}))
    with torch.no_grad():
        for one in model.parameters():
            if one.is_floating_point():
                one.add_(torch.randn_like(one))
    model.requires_grad_(False).set_adapter("two")
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    pack_nf4(model)
    save_adapters(model, tmp_path / "packed")
    for adapter in ("one", "two"):
        own, peft = (load_file(tmp_path / kind / adapter / "adapter_model.safetensors") for kind in ("packed", "whole"))
        assert own.keys() == peft.keys() and all(torch.equal(own[key], peft[key]) for key in own)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_saved(tied, targets, tmp_path):
    """Its new rows are random; without them the loaded model would have others."""
    config = tiny_llama_config(64, 1)
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path / "base")

    def resized(seed):
        model = random_nf4_llama(config.__class__.from_dict(config.to_dict()), "cpu", torch.float32)
        model.name_or_path = str(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    model = get_peft_model(resized(1), LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
    pack_nf4(model, 1)
    ids = torch.arange(58, 70)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        save_adapters(model, tmp_path / "saved")
        loaded = PeftModel.from_pretrained(resized(2), tmp_path / "saved")
        with patch_linear4bit(loaded):
            assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)


def test_a_model_that_is_not_of_transformers_is_saved(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    save_adapters(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for kind in ("lora_A", "lora_B"):
        weight = getattr(model.base_model.model[0], kind)["default"].weight
        assert torch.equal(saved[f"base_model.model.0.{kind}.weight"], weight)


OUTSIDE = {
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_adapters_outside_of_the_layers_are_refused(kind, tmp_path):
    model = get_peft_model(LlamaForCausalLM(tiny_llama_config(64, 1)), OUTSIDE[kind])
    with pytest.raises(
        ValueError, match=rf"^model must have adapters in its linear layers, .* got {kind} \('default'\)$"
    ):
        save_adapters(model, tmp_path)


@pytest.mark.parametrize("kind", [VeraConfig, RandLoraConfig, PveraConfig])
def test_adapters_with_random_projections_are_refused(kind, tmp_path):
    config = kind(target_modules=["q_proj"])
    model = get_peft_model(LlamaForCausalLM(tiny_llama_config(64)), config)
    with pytest.raises(ValueError, match=rf"weights are all parameters, got {config.peft_type.value} \('default'\)"):
        save_adapters(model, tmp_path)
