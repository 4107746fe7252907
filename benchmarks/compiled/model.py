"""The QLoRA model that steps are measured with, as before its first step, and batches of text for it."""

import functools

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.models import SEED, llama_1b_config, random_nf4_llama, tiny_llama_config
from unsloth_puzzles.bench.text import paragraphs


def qlora_model(device: str, dtype: torch.dtype, tiny: bool, drawn: torch.dtype | None = None):
    """Llama 3.2 1B (or a tiny one) in NF4 from fixed-seed weights, with adapters of rank 16 under all linear layers.

    dtype: what it computes in. drawn: what the weights are drawn in, `dtype` if None.
    """
    config = tiny_llama_config() if tiny else llama_1b_config()
    model = random_nf4_llama(config, device, drawn or dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()  # as `prepare_model_for_kbit_training` does: no layer differs from the others
    return renew(model, dtype)


def renew(model: torch.nn.Module, dtype: torch.dtype, checkpointing: bool = False) -> torch.nn.Module:
    """The model as before its first step, to compute in `dtype`: adapters drawn anew, packed weights as they are.

    The adapters stay in float32. The other weights must have been drawn in a dtype whose values `dtype` holds.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    torch.manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", True)
    for parameter in model.parameters():
        parameter.grad = None
    base = model.get_base_model()
    if checkpointing and not base.is_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif base.is_gradient_checkpointing and not checkpointing:
        base.gradient_checkpointing_disable()
    return model.train()


def text_batch(size: int, length: int, number: int, device: str) -> dict[str, torch.Tensor]:
    """Batch `number`: `size` stretches of the text, each byte a token and its own label."""
    starts = torch.randint(len(_text()) - length, (size,), generator=torch.Generator().manual_seed(SEED + number))
    ids = torch.stack([_text()[start : start + length] for start in starts.tolist()]).to(device)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def _text() -> torch.Tensor:
    return torch.tensor(list("\n".join(paragraphs()).encode()))
