"""Quantised layers and tiny QLoRA models for the tests of one process."""

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.models import random_nf4_llama, tiny_llama_config

VOCABULARY = 64


def layer(rows=48, columns=40, *, nested=True, bias=False, blocksize=64, quant_type="nf4", storage=torch.uint8):
    """A quantised layer with random weights."""
    made = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.float32, device="cpu")
    made.weight = Params4bit(
        torch.randn(rows, columns), requires_grad=False, compress_statistics=nested, quant_type=quant_type,
        blocksize=blocksize, quant_storage=storage,
    )  # fmt: skip
    made.to("cpu")
    if made.weight.quant_state is None:
        made.weight._quantize("cpu")
    return made


def qlora(**config):
    model = random_nf4_llama(tiny_llama_config(VOCABULARY), "cpu", torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    return model


def losses_and_gradients(model):
    ids = torch.arange(20).view(2, 10)
    loss = model(input_ids=ids, labels=ids).loss
    return loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
