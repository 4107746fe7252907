"""A model with adapters, and one training step of it."""

import torch

from tests.compiled.models import nf4_llama, with_adapters

LENGTHS = (24, 17, 40, 9)


def make_model(**checkpointing):
    model = with_adapters(nf4_llama())
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    return model


def batch(length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(64, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < length // 4, -100)}


def step(model, length):
    model.zero_grad()
    loss = model(**batch(length)).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found, expected):
    assert (found[0] - expected[0]).abs() <= 2e-6 * expected[0].abs()
    assert (found[1] - expected[1]).norm() <= 5e-6 * expected[1].norm()
