"""The command line of the training script."""

import argparse
import os

import torch

_OF_FSDP2 = (("reshard", True), ("offload", False), ("shard_embeddings", False), ("state_dict", "FULL_STATE_DICT"))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line; those that would have no effect end the process with a message.

    Args:
        arguments: The command line; None is the process's own.
    """
    made = parser()
    options = made.parse_args(arguments)
    sharded = "WORLD_SIZE" in os.environ
    if options.dequantize == "bitsandbytes" and (sharded or options.compile):
        made.error("argument --dequantize: bitsandbytes needs --no-compile, and no torchrun")
    for flag, default in () if sharded else _OF_FSDP2:
        if getattr(options, flag) != default:
            made.error(f"argument --{flag.replace('_', '-')}: it needs torchrun, also with one rank")
    return options


def parser() -> argparse.ArgumentParser:
    """The flags of `unsloth_puzzles.fsdp2.train`."""
    made = argparse.ArgumentParser(
        description="QLoRA on Python's language reference, by one GPU, or by torchrun on any number with FSDP2."
    )
    # No flag may begin one of torchrun's (--log-dir, --role, ...), which would take it for its own.
    made.add_argument("--model", required=True, help="of the hub, or a folder")
    made.add_argument("--layers", type=int, help="random weights, and this many layers of the architecture")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--rows", type=int, default=2, help="of a step, of all ranks together")
    made.add_argument("--length", type=int, default=512, help="tokens of a row")
    made.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    made.add_argument("--learning-rate", type=float, default=2e-4)
    made.add_argument("--lora-rank", type=int, default=16, help="rank of the adapters")
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    made.add_argument(
        "--dequantize", choices=("ours", "bitsandbytes"), default="ours", help="without torchrun and compile"
    )
    for flag, default, text in (
        ("compile", True, "decoder layers, norm and loss by compile_qlora"),
        ("checkpointing", True, "compute activations again in the backward"),
        ("reshard", True, "free gathered weights after the forward"),
        ("offload", False, "keep shards and optimizer states in CPU memory"),
        ("shard-embeddings", False, "shard embedding and head as well"),
    ):
        made.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=default, help=text)
    made.add_argument("--output", help="a folder for the adapters and checkpoints")
    made.add_argument("--save-steps", type=int, help="a checkpoint every so many steps")
    made.add_argument("--state-dict", choices=("FULL_STATE_DICT", "SHARDED_STATE_DICT"), default="FULL_STATE_DICT")
    made.add_argument("--resume", help="a checkpoint folder of this script, of any number of ranks")
    made.add_argument("--log-file", help="a file for a line of JSON a step")
    made.add_argument("--summary-file", help="a JSON file: share of the 4-bit bytes, compilations, graph breaks")
    return made
