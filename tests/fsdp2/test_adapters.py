"""A sharded model with adapters: what PEFT's switches leave trained, and generation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora

CONFIG = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False}


def qlora(**config):
    model = random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**CONFIG, **config), "first")
    model.add_adapter("second", LoraConfig(**CONFIG, **config))
    return model


def reference(model, ids):
    with model.disable_adapter(), torch.no_grad():
        return model(input_ids=ids).logits


def other_adapter(model, ids):
    model.set_adapter("second")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    model.set_adapter("first")
    return logits


def train(model, before):
    """The norms of the gradients by name in two steps after a call without gradients, and that call's logits."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found, logits = [], before(model, ids)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return found, logits


@pytest.mark.parametrize("before", [reference, other_adapter])
@pytest.mark.parametrize("reshard", [True, False])
def test_adapters_are_trained_after_they_were_disabled(reshard, before, mesh, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = {} if before is reference else {"modules_to_save": ["lm_head"]}  # the head is in the root's group
    model, expected = qlora(**config), qlora(**config)
    pack_nf4(model), pack_nf4(expected)
    shard_qlora(model, mesh, reshard_after_forward=reshard)
    gradients, logits = train(model, before)
    expected_gradients, expected_logits = train(expected, before)
    assert torch.equal(logits, expected_logits)
    assert [one.keys() for one in gradients] == [one.keys() for one in expected_gradients]
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert any("first" in name for name in one) and not any("second" in name for name in one)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda model: (model.add_adapter("third", LoraConfig(**CONFIG)), model.set_adapter("third")), "third"),
        (lambda model: model.get_input_embeddings().requires_grad_(True), "embed_tokens"),
    ],
)
def test_parameters_trained_only_after_sharding_are_refused(change, named, mesh):
    model, ids = qlora(), torch.arange(8).view(1, 8)
    pack_nf4(model)
    shard_qlora(model, mesh)
    model(input_ids=ids, labels=ids).loss.backward()
    change(model)
    with pytest.raises(RuntimeError, match=f"^model must train only what FSDP2 has sharded, got .*{named}.*, whose"):
        model(input_ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_some_tokens_are_trained(dtype, mesh):
    """PEFT writes the trained rows into the frozen embedding, which FSDP2 leaves whole."""
    found = []
    for sharded in (False, True):
        model = random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**CONFIG, trainable_token_indices=[3, 5]), "first")
        pack_nf4(model)
        if sharded:
            shard_qlora(model, mesh, param_dtype=dtype)
        found.append(train(model, lambda *_: None)[0])
    expected, gradients = found
    for one, other in zip(gradients, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5 if dtype is None else 0.05)
        assert sum("token_adapter" in name for name in one) == 1


def test_a_sharded_model_generates_the_same_tokens(mesh, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, ids = qlora(task_type="CAUSAL_LM"), torch.arange(2, 10).view(1, 8)
    pack_nf4(model)
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    shard_qlora(model, mesh)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
