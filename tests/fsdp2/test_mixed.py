"""A float32 model under a policy of 16 bits: embeddings and head that are not sharded, checkpoints, additive masks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import frozen_embeddings, shard_qlora

IDS = torch.arange(2, 22).view(2, 10)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0  # padded on the left: these queries see no key
LABELS = IDS.masked_fill(torch.arange(10) < 5, -100)
HALVES = (torch.bfloat16, torch.float16)


def packed(attention: str = "eager", checkpointing: bool = False) -> torch.nn.Module:
    model = random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32)
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pack_nf4(model, 1)
    return model.train()


def step(model, dtype: torch.dtype | None = None, mask: torch.Tensor = MASK) -> tuple[torch.Tensor, ...]:
    """The loss and the gradients, under autocast to `dtype` if one is given."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, attention_mask=mask, labels=LABELS).loss
    loss.backward()
    return loss.detach(), *(one.grad.to_local() for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize(
    "dtype, autocast, attention, checkpointing",
    [
        (torch.bfloat16, True, "eager", False),
        (torch.bfloat16, False, "sdpa", True),
        *(
            pytest.param(dtype, autocast, *of_model, marks=pytest.mark.slow)
            for dtype in HALVES
            for autocast in (False, True)
            for of_model in (("eager", False), ("eager", True), ("sdpa", True))
        ),
    ],
)
def test_replicated_embeddings_give_what_sharded_ones_give(dtype, autocast, attention, checkpointing, mesh):
    found = {}
    for sharded in (False, True):
        model = packed(attention, checkpointing)
        shard_qlora(model, mesh, param_dtype=dtype, shard_embeddings=sharded)
        found[sharded] = step(model, dtype if autocast else None)
    plain = packed(attention)(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.item()
    assert found[False][0].item() == pytest.approx(plain, rel=2e-3)
    assert len(found[False]) == 1 + 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found.values(), strict=True))


@pytest.mark.parametrize("dtype", [None, *HALVES])
def test_replicated_embeddings_have_the_dtype_of_the_policy(dtype, mesh):
    model = shard_qlora(packed(), mesh, param_dtype=dtype)
    kinds = {one.dtype for module in frozen_embeddings(model.get_base_model()) for one in module.parameters()}
    assert kinds == {dtype or torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_an_additive_mask_of_float32_stays_finite(dtype, mesh):
    """The caller's own mask, which FSDP2 casts as an input of the model."""
    visible = torch.ones(10, 10).tril().bool() & MASK.bool()[:, None, None]  # [batch, 1, queries, keys]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = step(shard_qlora(packed(), mesh, param_dtype=dtype))
    found = step(shard_qlora(packed(), mesh, param_dtype=dtype), mask=additive)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
