"""Which weights of embedding and head each rank keeps whole: the frozen ones, since their gradients are not reduced."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.shard import base_of, frozen_embeddings

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
