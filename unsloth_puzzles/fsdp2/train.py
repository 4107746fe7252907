"""Fine-tune a causal LM by QLoRA on one GPU, or on any number of them with FSDP2, through TRL's SFTTrainer.

    torchrun --nproc_per_node 2 -m unsloth_puzzles.fsdp2.train --model unsloth/Meta-Llama-3.1-8B-bnb-4bit
    python -m unsloth_puzzles.fsdp2.train --model unsloth/Meta-Llama-3.1-8B-bnb-4bit

Both train on the same rows (of Python's language reference) in the same order: `--rows` counts the rows of all ranks.
No flag chooses other data: for that, `make_trainer` shows the calls. torchrun takes the way of FSDP2 with one rank,
too, so that a checkpoint of two ranks can be resumed by one and the reverse. A checkpoint of `python` can be resumed by
`python` alone. A line of JSON a step goes to `--log-file`.

The adapters go to `--output` in PEFT's format: `PeftModel.from_pretrained(load(...), output)` is a model of ordinary
layers in one process, to generate with or to merge.
"""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.bench.text import paragraphs
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.device import capability
from unsloth_puzzles.fsdp2.flags import DTYPES, parse
from unsloth_puzzles.fsdp2.load import SEED, load
from unsloth_puzzles.fsdp2.options import fsdp2_arguments, prepare_trainer
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.ranks import use_one_gpu
from unsloth_puzzles.fsdp2.save import save_adapters
from unsloth_puzzles.fsdp2.shard import float32_adapters
from unsloth_puzzles.fsdp2.step_log import StepLog, write_summary
from unsloth_puzzles.nf4.patch import patch_linear4bit

COLLECTIVE_MINUTES = 10  # a rank that has died ends the others after this time


@record  # torchrun ends the other ranks and shows the message of the one that failed first
def main(arguments: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train as the command line says.

    Args:
        arguments: The command line; None is the process's own.
        callbacks: Of the trainer, besides the log.
    """
    options = parse(arguments)
    world = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None  # of torchrun, also with one rank
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if world is None:
        use_one_gpu()
    if options.rows % (world or 1):
        raise ValueError(f"--rows must be divisible by the {world} ranks, got {options.rows}")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_seed(SEED)
    dtype = _dtype(options.dtype, device)
    model = load(options.model, device, dtype, layers=options.layers)
    model = get_peft_model(model, LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if world:
        if not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=COLLECTIVE_MINUTES))
        pack_nf4(model, world)
    trainer = make_trainer(model, options, world, device, dtype, callbacks)
    with count_compilations() as counts, _kernels(trainer, options):
        trainer.train(resume_from_checkpoint=options.resume)
    if options.summary_file and trainer.is_world_process_zero():
        write_summary(options.summary_file, trainer.model, counts)
    if options.output:
        save_adapters(trainer.model, options.output)  # the Trainer saves none of a SHARDED_STATE_DICT
        if trainer.is_world_process_zero():
            trainer.processing_class.save_pretrained(options.output)
    if dist.is_initialized():
        dist.barrier()  # a rank that ends takes its part of the store with it
        dist.destroy_process_group()


def make_trainer(
    model: PreTrainedModel,
    options: argparse.Namespace,
    world: int | None,
    device: torch.device,
    dtype: torch.dtype,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """TRL's trainer for `options`, whose `train()` shards the model over `world` ranks; with None it does not."""
    sharded = {}
    if world:
        sharded = fsdp2_arguments(
            model, offload=options.offload, reshard_after_forward=options.reshard, state_dict_type=options.state_dict
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = SFTConfig(
        output_dir=options.output or "build/fsdp2",
        per_device_train_batch_size=options.rows // (world or 1),
        gradient_accumulation_steps=options.accumulate,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_length=options.length,
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        report_to=[],
        seed=SEED,
        data_seed=SEED,
        **sharded,
    )
    rows = rows_of(tokenizer, options.length)
    log = StepLog(options.log_file, options.rows * options.length * options.accumulate)
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[log, *callbacks])
    float32_adapters(trainer.model)
    if world:
        prepare_trainer(trainer, shard_embeddings=options.shard_embeddings)
    return trainer


def rows_of(tokenizer, length: int) -> Dataset:
    """Rows of `length` tokens of Python's language reference, laid end to end."""
    ids = tokenizer("\n\n".join(paragraphs()))["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise ValueError(f"length must be at most {len(ids)} tokens, the whole text, got {length}")
    return Dataset.from_dict({"input_ids": rows})


def _kernels(trainer: SFTTrainer, options: argparse.Namespace):
    if options.compile:
        return compile_qlora(trainer)
    if not trainer.is_fsdp_enabled and options.dequantize == "ours":
        return patch_linear4bit(trainer.model)
    return contextlib.nullcontext()


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if capability(device) >= 80 else torch.float16


if __name__ == "__main__":
    main()
    if "WORLD_SIZE" in os.environ:  # a thread of gloo that frees its last tensor while Python ends aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
