"""Two ranks whose models or rows differ, and the error that each rank gets.

torchrun --nproc_per_node 2 -m tests.fsdp2.different_ranks OUT
"""

import json
import sys
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.fsdp2 import (
    accelerate_on_cpu,  # noqa: F401
    ranks,
)
from benchmarks.fsdp2.ranks import RANK
from benchmarks.models import random_llama, random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.options import fsdp2_arguments, prepare_trainer
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import base_of, shard_qlora


def qlora(
    layers: int = 2,
    four_bit: bool = True,
    seed: int = 0,
    embeddings: float = 1.0,
    reverse: bool = False,
    adapters: float = 1.0,
    **config: object,
) -> nn.Module:
    make = random_nf4_llama if four_bit else random_llama
    model = make(tiny_llama_config(64, layers), "cpu", torch.float32, seed)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight.mul_(embeddings)
        weight.copy_(weight.flip(0) if reverse else weight.clone())
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data *= adapters
    return model


def pack(**of_the_second: object) -> None:
    pack_nf4(qlora(**(of_the_second if RANK else {})))


def shard(
    dtype: torch.dtype = torch.float32, frozen: str = "none", table: float = 1.0, **of_the_second: object
) -> None:
    model = qlora(**(of_the_second if RANK else {}))
    pack_nf4(model)
    if RANK:
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.code *= table
    for name, parameter in model.named_parameters():
        if RANK and parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad = frozen not in name
    shard_qlora(model, ranks.mesh())


def prepare(
    optimizer: tuple | None = None,
    arguments: dict = MappingProxyType({}),
    of_both: dict = MappingProxyType({}),
    **of_the_second: object,
) -> None:
    model = qlora(**of_both, **(of_the_second if RANK else {}))
    pack_nf4(model)
    settings = TrainingArguments(use_cpu=True, report_to=[], **arguments, **fsdp2_arguments(model))
    prepare_trainer(Trainer(model, settings, optimizer_cls_and_kwargs=optimizer))
    model(input_ids=torch.arange(6).view(1, 6))  # nothing refuses it any more


def unequal_labels(by_a_trainer: bool) -> None:
    """Rows of 8, 6, 2 and 1 labels: the ranks' numbers differ, however they share the rows."""
    model = qlora(layers=1)
    pack_nf4(model)
    trained = [one for one in model.parameters() if one.requires_grad]
    ids = torch.arange(36).view(4, 9)
    labels = ids.masked_fill(torch.arange(9) > torch.tensor([8, 6, 2, 1])[:, None], -100)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    expected = [loss.item(), torch.nn.utils.get_total_norm([one.grad for one in trained]).item()]
    model.zero_grad()
    if by_a_trainer:
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
        settings = TrainingArguments(use_cpu=True, report_to=[], **settings, **fsdp2_arguments(model))
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
        trainer = Trainer(model, settings, train_dataset=rows)
        prepare_trainer(trainer)
        trainer.train()
        found = [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]
    else:
        shard_qlora(model, ranks.mesh())
        own, count = slice(2 * RANK, 2 * RANK + 2), (labels[:, 1:] != -100).sum() / 2
        loss = model(input_ids=ids[own], labels=labels[own], num_items_in_batch=count).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
        found = [ranks.average(loss.detach()), ranks.whole(norm).item()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def one_step(**arguments: object) -> tuple[Trainer, float]:
    """A prepared trainer, and the loss of its model before."""
    model, ids = qlora(layers=1), [[(7 * row + place) % 64 for place in range(9)] for row in range(8)]
    pack_nf4(model)
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with torch.no_grad():
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    settings = {"max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, **arguments}
    settings = TrainingArguments(use_cpu=True, report_to=[], **settings, **fsdp2_arguments(model))
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    prepare_trainer(trainer)
    return trainer, loss


def evaluate_at_the_start() -> None:
    trainer, before = one_step(eval_on_start=True)
    trainer.train()
    assert abs(trainer.state.log_history[0]["eval_loss"] - before) < 1e-5
    assert trainer.evaluate()["eval_loss"] < before


def train_in_bfloat16(attention: str) -> None:
    """A float32 model whose layers are computed again in the backward."""
    options = {"per_device_train_batch_size": 4, "logging_steps": 1, "bf16": True, "gradient_checkpointing": True}
    trainer, before = one_step(**options)
    base_of(trainer.model).set_attn_implementation(attention)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - before) < 2e-3 * before


def predict_first() -> None:
    trainer, _ = one_step()
    trainer.predict(trainer.eval_dataset)


def prepare_of_trl(**config: object) -> None:
    model = qlora(**config)
    pack_nf4(model)
    settings = SFTConfig(use_cpu=True, bf16=False, report_to=[], **fsdp2_arguments(model))
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 4})
    prepare_trainer(SFTTrainer(model, settings, train_dataset=rows, processing_class=tiny_tokenizer()))


def forget_to_prepare() -> None:
    model = qlora()
    pack_nf4(model)
    fsdp2_arguments(model)
    model(input_ids=torch.arange(6).view(1, 6))


CASES = {
    "packed layers": lambda: pack(layers=1),
    "no packed layer": lambda: pack(four_bit=False),
    "shapes": lambda: shard(r=8),
    "names": lambda: shard(frozen="k_proj"),
    "dtypes": lambda: shard(dtype=torch.bfloat16),
    "one more": lambda: shard(modules_to_save=["lm_head"]),
    "other 4-bit weights": lambda: shard(seed=1),
    "other embeddings": lambda: shard(embeddings=2.0),
    "other adapters": lambda: shard(adapters=2.0),
    "rows in another order": lambda: shard(reverse=True),
    "another table": lambda: shard(table=2.0),
    "the same": shard,
    "shapes, under a Trainer": lambda: prepare(r=8),
    "the same, under a Trainer": prepare,
    "an optimizer by name": lambda: prepare(arguments={"optim": "adafactor"}),
    "an optimizer by class": lambda: prepare((torch.optim.RMSprop, {})),
    "compiled by the Trainer": lambda: prepare(arguments={"torch_compile": True}),
    "a trained head under TRL": lambda: prepare_of_trl(modules_to_save=["lm_head"]),
    "a frozen head under TRL": prepare_of_trl,
    "a trained head under a Trainer": lambda: prepare(of_both={"modules_to_save": ["lm_head"]}),
    "evaluated before it is trained": lambda: one_step()[0].evaluate(),
    "predicts before it is trained": predict_first,
    "evaluated at the start of its training": evaluate_at_the_start,
    "evaluated in bfloat16": lambda: prepare(arguments={"bf16_full_eval": True}),
    "evaluated in float16": lambda: prepare(arguments={"fp16_full_eval": True}),
    "some tokens, under a Trainer": lambda: prepare(of_both={"trainable_token_indices": [1, 5]}),
    "unequal labels, under a Trainer": lambda: unequal_labels(True),
    "unequal labels, by shard_qlora": lambda: unequal_labels(False),
    "not prepared": forget_to_prepare,
    # The last: `accelerate_on_cpu` keeps the policy of 16 bits for the trainers that follow.
    "float32 trained in bfloat16": lambda: train_in_bfloat16("sdpa"),
    "float32 trained in bfloat16, eager attention": lambda: train_in_bfloat16("eager"),
}


def main(out: str) -> None:
    ranks.start()
    found = {}
    for name, case in CASES.items():
        error, everyones = None, [None, None]
        try:
            case()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        dist.all_gather_object(everyones, error)
        found[name] = everyones
    if RANK == 0:
        Path(out).write_text(json.dumps(found))
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
