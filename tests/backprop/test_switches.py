"""A head that is switched between a forward and the backward that repeats it: refused, unless all logits were kept."""

import peft
import pytest
import torch
from torch import nn

from benchmarks.models import random_llama, tiny_llama_config
from unsloth_puzzles.backprop import memory_efficient_linear
from unsloth_puzzles.backprop.losses import token_log_probs

VOCABULARY = 64
SWITCHES = {
    "another adapter": lambda model: model.set_adapter("other"),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
    "another scale": lambda model: model.lm_head.set_scale("default", 3.0),
    "merged": lambda model: model.merge_adapter(),
    "evaluation": lambda model: model.eval(),
}
REFUSED = r"^linear must be as in its forward, .* call backward\(\) before"


def adapted(dropout: float = 0.0):
    """A tiny Llama with two adapters on its head, whose B is not zero."""
    llama = tiny_llama_config(VOCABULARY)
    llama.tie_word_embeddings = False
    model = random_llama(llama, "cpu")
    config = {"r": 4, "target_modules": ["lm_head"], "lora_dropout": dropout, "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**config))
    return model.train()


def gradient(model, apply, between=lambda model: None) -> torch.Tensor:
    """Of the hidden states, for the sum of the log-probabilities of a forward, with `between` before the backward."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 64, generator=generator, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, 9), generator=generator)
    torch.manual_seed(2)
    results = apply(x, model.lm_head, labels)
    between(model)
    results.sum().backward()
    return x.grad


def ours(keep_logits: int | str):
    def apply(x, head, labels):
        options = {"reduction": "none", "chunk_size": 4, "keep_logits": keep_logits}
        return memory_efficient_linear(x, head, labels, token_log_probs, **options)

    return apply


def plain(x, head, labels):
    return token_log_probs(head(x), labels)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switched_head_is_refused(name):
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient(adapted(dropout=0.5), ours(0), SWITCHES[name])


@pytest.mark.parametrize("name", ["another adapter", "no adapter", "another scale"])
def test_kept_logits_need_no_second_forward(name):
    model = adapted()
    found = gradient(model, ours("1GiB"), SWITCHES[name])
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    model.lm_head.set_scale("default", 1.0)
    torch.testing.assert_close(found, gradient(model, plain))


def test_a_head_that_is_switched_back_is_as_before():
    """As a trainer does that asks the base model for its log-probabilities before the backward."""

    def there_and_back(model):
        with model.disable_adapter():
            pass
        model.eval()
        model.train()

    model = adapted()
    found = gradient(model, ours(0), there_and_back)
    torch.testing.assert_close(found, gradient(model, plain))


def test_a_head_without_adapters_is_refused_too():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, VOCABULARY))
    x, labels = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    results = memory_efficient_linear(x, head, labels, token_log_probs, reduction="none", chunk_size=2)
    head[0].p = 0.25
    with pytest.raises(RuntimeError, match=REFUSED):
        results.sum().backward()
