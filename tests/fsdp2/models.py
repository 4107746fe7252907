"""Quantised layers and tiny QLoRA models for the tests of one process."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.models import random_nf4_layer, random_nf4_llama, tiny_llama_config

VOCABULARY = 64


def layer(rows=48, columns=40, **options):
    return random_nf4_layer(rows, columns, **options)


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
