"""Layers and models for patch_linear4bit, and a training step of a model."""

import bitsandbytes as bnb
import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import random_nf4_llama, tiny_llama_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 on a CPU: the same products in the same order. On a GPU bitsandbytes' fused kernel sums in another order.
TIGHT = 1e-6 if DEVICE == "cpu" else 1e-5


# What bitsandbytes multiplies a packed weight with. Before its fused kernel for any number of rows it de-quantised the
# weight, but for one row.
_OPS = [getattr(torch.ops.bitsandbytes, name, None) for name in ("gemm_4bit", "dequantize_4bit", "gemv_4bit")]
PRODUCTS = [op.default for op in (_OPS[:1] if _OPS[0] is not None else _OPS[1:])]


class Fused(TorchDispatchMode):
    """Counts products of bitsandbytes with a packed weight: by its fused 4-bit GEMM, where it has one."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function in PRODUCTS
        return function(*args, **(kwargs or {}))


def linear4bit(quant_type="nf4", bias=True, compute_dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 96, bias=bias, quant_type=quant_type, compute_dtype=compute_dtype, **options)
    layer.support_avx512bf16_for_cpu = False  # else eval mode re-packs the weight, and rounds it, on CPUs that have it
    return layer.to(DEVICE)


def llama(dtype=torch.float32):
    return random_nf4_llama(tiny_llama_config(layers=2), DEVICE, dtype)


def lora(model):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: no gradient would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


IDS = (torch.arange(24) * 37 % 256).view(2, 12).to(DEVICE)


def step(model):
    """Loss and the gradients of everything trainable."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_same_step(actual, expected, bound=TIGHT):
    assert relative(actual[0], expected[0]) <= bound
    assert actual[1].keys() == expected[1].keys() and len(expected[1]) == 2 * 2 * 7
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0 and relative(actual[1][name], gradient) <= bound, name
