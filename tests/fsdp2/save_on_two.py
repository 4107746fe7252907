"""Models of two ranks, by a plain loop and by a Trainer: losses, logits after training, and the saved adapters.

python -m tests.fsdp2.save_on_two FOLDER                                  one process
torchrun --nproc_per_node 2 -m tests.fsdp2.save_on_two FOLDER             two
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from benchmarks.fsdp2 import (
    accelerate_on_cpu,  # noqa: F401
    ranks,
)
from benchmarks.fsdp2.ranks import RANK, WORLD
from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.options import fsdp2_arguments, prepare_trainer
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.save import save_adapters
from unsloth_puzzles.fsdp2.shard import shard_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

VOCABULARY, STEPS, ROWS = 64, 2, 4
LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES = {  # options of LoraConfig
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "adapted embedding and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
}


def base() -> nn.Module:
    config = tiny_llama_config(VOCABULARY)
    config.tie_word_embeddings = False
    return random_nf4_llama(config, "cpu", torch.float32)


def ids(seed: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (ROWS, 12), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module) -> torch.Tensor:
    """Of the same rows on every rank."""
    with torch.no_grad():
        return model.eval()(input_ids=ids(99)).logits


def qlora(name: str) -> nn.Module:
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **CASES[name]}
    model = get_peft_model(base(), LoraConfig(**config))
    pack_nf4(model) if WORLD > 1 else patch_linear4bit(model)
    return model


def by_loop(model: nn.Module) -> list[float]:
    if WORLD > 1:
        shard_qlora(model, ranks.mesh())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        own = ids(step).chunk(WORLD)[RANK]
        loss = model.train()(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ranks.average(loss))
    return losses


def by_trainer(model: nn.Module) -> list[float]:
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for step in range(STEPS) for row in ids(step).tolist()])
    settings = TrainingArguments(
        per_device_train_batch_size=ROWS // WORLD, max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        **(fsdp2_arguments(model) if WORLD > 1 else {}),
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows)
    if WORLD > 1:
        prepare_trainer(trainer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(folder: str) -> None:
    ranks.start()
    jobs = [(name, name, by_loop) for name in CASES]
    jobs += [(f"{name}, Trainer", name, by_trainer) for name in ("LoRA", "trained head")]
    for job, name, train in jobs:
        model, path = qlora(name), Path(folder, job)
        losses = train(model)
        save_adapters(model, path)
        torch.save({"losses": losses, "logits": logits_of(model)}, path / f"rank{RANK}.pt")
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
