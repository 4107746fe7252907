"""Models, batches and trainers for use_memory_efficient_loss, and what full logits give."""

import torch
import torch.nn.functional as F
from transformers import (
    LlamaForCausalLM,
    TrainingArguments,
)

from benchmarks.models import tiny_llama_config

VOCABULARY = 256
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # logits large enough that a forgotten cap or scale shows
}


def llama(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = tiny_llama_config(VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).to(dtype)


def batch(rows=3, length=17, seed=1):
    """Right-padded sequences of several lengths, their prompts masked: 3, 5, 7, ... labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    labels, attention_mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row in range(rows):
        end = length - 2 * row
        attention_mask[row, end:] = 0
        labels[row, end - 4 - row : end] = ids[row, end - 4 - row : end]
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, labels, num_items_in_batch=None, **inputs):
    """Loss and gradients of full logits in the model's dtype; transformers would round float64 logits to float32."""
    model.zero_grad()
    logits = model(**inputs).logits[:, -labels.shape[1] :]  # without the virtual tokens of prompt tuning
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    loss = loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance=1e-12):
    assert (ours[0] - theirs[0]).abs() <= tolerance * theirs[0].abs()
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    largest = max(gradient.norm() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():  # some, such as those of key biases, are zero but for rounding
        assert (ours[1][name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3 * largest), name


class Data(torch.utils.data.Dataset):
    """Sequences with 1 to 15 labels each."""

    def __init__(self, size, length=16):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
        self.prompts = torch.randint(1, length - 1, (size,), generator=generator).tolist()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: self.prompts[index]] = -100
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(labels), "labels": labels}


def arguments(folder, kind=TrainingArguments, **options):
    return kind(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", seed=0, use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
