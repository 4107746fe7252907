"""NF4 layers and small models with adapters for the tests of exports."""

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.gguf.models import tiny
from benchmarks.models import random_nf4_layer, random_nf4_llama, tiny_llama_config

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def nf4_layer(rows=48, columns=64, **options):
    return random_nf4_layer(rows, columns, **options)


def with_adapters(model, **lora):
    """PEFT's model, with adapters that are not zero."""
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.eval()


def qlora(**lora):
    """A 4-bit Llama of 2 layers, whose linear layers have rows of whole blocks, with adapters."""
    return with_adapters(random_nf4_llama(tiny_llama_config(64), "cpu", torch.float32), **lora)


def lora(family="llama", text=None, **settings):
    """A model of `benchmarks.gguf.models` in float32 with adapters on its text model, and its processor."""
    model, processor = tiny(family, **(text or {}))
    targets = settings.pop("target_modules", r".*(language_model|model)\.layers.*\.(q|k|v|down)_proj")
    return with_adapters(model, target_modules=targets, **settings), processor
