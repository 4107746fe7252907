"""The same training of a classifier by bitsandbytes and PEFT, by the kernel of challenge A, and compiled.

found = check_losses(Checkpoints("cuda", layers=2), compiled=True)
"""

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.classification.traps import LARGEST, NAMES, Checkpoints
from benchmarks.models import SEED, nf4_config
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.classification.adapters import load_trained, save_classifier
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit
from unsloth_puzzles.nf4.dequantize import dequantize

BATCHES = [["one", "two", "three"], ["a longer text", "x"], ["of words", "in a row", "for three"]] * 2


class Losses(NamedTuple):
    """The findings of `check_losses`."""

    by_way: dict[str, torch.Tensor]  # losses of the steps: "transformers", "patched", maybe "compiled"
    differences: dict[str, float]  # the largest from transformers', by the other ways
    calls: dict[str, int]  # of the kernel, without the compiled way, whose graphs hold it as an operator
    layers: int  # in 4 bits
    graphs: int | None  # of the compiled way
    checks: dict[str, bool]


def check_losses(made: Checkpoints, *, compiled: bool, steps: int = len(BATCHES)) -> Losses:
    """Train a few steps each way from the same weights; then save, load, and compare the logits.

    Args:
        made: The model.
        compiled: Train by `compile_qlora` as well.
        steps: At most `len(BATCHES)`.
    """
    ways = {"transformers": nullcontext, "patched": patch_linear4bit} | (
        {"compiled": compile_qlora} if compiled else {}
    )
    _, tokenizer = made.ours()
    found, calls, layers = {}, {}, 0
    for way, exchange in ways.items():
        model = _transformers_own(made, tokenizer) if way == "transformers" else made.ours()[0]
        model.config.use_cache = False
        layers = sum(isinstance(module, Linear4bit) for module in model.modules())
        # Compiled code has the kernel as an operator, in its graphs.
        calling = patch("unsloth_puzzles.nf4.linear.dequantize", wraps=dequantize)
        counter = calling if way != "compiled" else nullcontext()
        with exchange(*[] if way == "transformers" else [model]), count_compilations() as counts, counter as kernel:
            found[way] = _train(made, model, tokenizer, BATCHES[:steps])
        if kernel:
            calls[way] = kernel.call_count
        print(f"{way:>12}: {' '.join(f'{loss:.6f}' for loss in found[way])}", flush=True)
    checks = {
        "patched: at least a call of the kernel for each layer and step": calls["patched"] >= layers * steps,
        "transformers: it does not": calls["transformers"] == 0,
    }
    others = list(ways)[1:]
    differences = {way: (found[way] - found["transformers"]).abs().max().item() for way in others}
    checks |= {f"losses, {way}": off <= LARGEST for way, off in differences.items()}
    if compiled:
        checks["compiled: graphs without a break"] = counts.graphs > 0 and not counts.graph_breaks
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(model, tokenizer, folder)
        again, its_tokenizer = load_trained(folder, device=made.device)
        same = torch.equal(made.logits(again, its_tokenizer), made.logits(model, tokenizer))
    checks["identical logits after loading"] = same
    return Losses(found, differences, calls, layers, counts.graphs if compiled else None, checks)


def _transformers_own(made: Checkpoints, tokenizer):
    """bitsandbytes' layers under transformers' classifier and PEFT's adapters."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        made.plain, num_labels=len(NAMES), quantization_config=nf4_config(torch.float32), dtype=torch.float32,
        device_map={"": made.device},
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options)).train()


def _train(made: Checkpoints, model, tokenizer, batches: Sequence[Sequence[str]]) -> torch.Tensor:
    """The losses of the steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for texts in batches:
        labels = torch.arange(len(texts), device=made.device)
        loss = model(**made.rows(tokenizer, texts), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)
