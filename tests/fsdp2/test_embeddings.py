"""Which weights of embedding and head each rank keeps whole: the frozen ones, since their gradients are not reduced."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import base_of, frozen_embeddings, shard_qlora

EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
TIED = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}


@pytest.mark.parametrize(
    "config, tied, whole",
    [
        ({}, False, {EMBEDDING, HEAD}),
        ({}, True, {EMBEDDING}),
        ({"modules_to_save": ["lm_head"]}, False, {EMBEDDING, f"{HEAD}.original_module"}),
        ({"modules_to_save": ["embed_tokens"]}, False, {f"{EMBEDDING}.original_module", HEAD}),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False, {f"{EMBEDDING}.base_layer", f"{HEAD}.base_layer"}),
        (TIED, True, {f"{EMBEDDING}.original_module"}),
    ],
)
def test_frozen_weights_alone_are_kept_whole(config, tied, whole):
    settings = tiny_llama_config(64)
    settings.tie_word_embeddings = tied
    model = random_nf4_llama(settings, "cpu", torch.float32)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **config}))
    found = {name for name, module in model.named_modules() if module in frozen_embeddings(base_of(model))}
    assert found == whole


def test_an_embedding_that_is_trained_itself_is_not_kept_whole():
    settings = tiny_llama_config(64)
    settings.tie_word_embeddings = False
    model = random_nf4_llama(settings, "cpu", torch.float32)
    base = base_of(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    base.get_input_embeddings().requires_grad_()
    assert frozen_embeddings(base) == [base.get_output_embeddings()]


ADAPTED = {
    "head, copied": {"modules_to_save": ["lm_head"]},
    "both, copied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied, copied": TIED,
    "both by LoRA": {"target_modules": ["embed_tokens", "lm_head"]},
    "some tokens": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_of_embeddings_can_be_activated_after_sharding(name, mesh):
    """While another one is active, what it trains of embedding and head is frozen."""
    settings = tiny_llama_config(64, 1)
    settings.tie_word_embeddings = name == "tied, copied"
    lora = LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM", **ADAPTED[name]})
    ids, found = torch.arange(8).view(1, 8), []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(random_nf4_llama(settings, "cpu", torch.float32), lora, "first")
        model.add_adapter("second", lora)
        pack_nf4(model)
        if sharded:
            shard_qlora(model, mesh)
        model.set_adapter("second")
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        found.append({name: one.full_tensor() if sharded else one for name, one in grads.items()})
    expected, gradients = found
    assert gradients.keys() == expected.keys() and all("second" in name for name in gradients)
    for name, one in gradients.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-7)
