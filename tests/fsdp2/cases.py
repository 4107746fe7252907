"""Runs that tests read: QLoRA of a tiny Llama in one process, and by FSDP2 in two over gloo.

    python tests/fsdp2/cases.py loops OUT          one process: each case's losses and gradient norms
    torchrun --nproc_per_node 2 tests/fsdp2/cases.py loops OUT     two

Every process draws the same weights, adapters and rows; a rank takes its half of the rows.
"""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2 import linear
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora
from unsloth_puzzles.fsdp2.stream import stream_of

# The kernel in Triton's interpreter takes most of the time; a plain formula in its place but for one case.
SIGNATURE = (
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, "
    "int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor"
)
torch.library.define("fsdp2_tests::dequantize_nf4", SIGNATURE)
torch.library.define("fsdp2_tests::dequantize_nf4_again", SIGNATURE.replace("(", "(Tensor grad_output, ", 1))


def formula(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1).long()[: math.prod(shape)]
    scales = code2[absmax.long()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)] + offset
    return (code[codes] * scales.repeat_interleave(blocksize)[: len(codes)]).view(shape).to(dtype)


torch.library.impl("fsdp2_tests::dequantize_nf4", "CPU", formula)
torch.library.impl("fsdp2_tests::dequantize_nf4_again", "CPU", lambda grad_output, *parts: formula(*parts))


@torch.library.register_fake("fsdp2_tests::dequantize_nf4")
def _(packed, *parts):
    return torch.empty(parts[-2], dtype=parts[-1], device=packed.device)


@torch.library.register_fake("fsdp2_tests::dequantize_nf4_again")
def _(grad_output, packed, *parts):
    return torch.empty(parts[-2], dtype=parts[-1], device=packed.device)


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, ROWS, LENGTH, VOCABULARY = 4, 4, 17, 256


def qlora(checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny Llama in NF4, with adapters whose B is not zero, trained."""
    torch.manual_seed(11)
    model = random_nf4_llama(tiny_llama_config(VOCABULARY), "cpu", dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model: torch.nn.Module) -> dict[str, list[float]]:
    """Losses over all rows and norms of the gradients, step by step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses, norms = [], []
    for step in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        own = ids.chunk(WORLD)[RANK]
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if WORLD > 1:
            dist.all_reduce(mean)
            mean /= WORLD
            norm = norm.full_tensor()
        losses.append(mean.item())
        norms.append(norm.item())
    return {"losses": losses, "norms": norms}


def streams_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: stream_of(module.weight).clone()
        for name, module in model.named_modules()
        if isinstance(module, StreamLinear4bit)
    }


def loop(checkpointing: bool = False, backend: str | None = None, **options: object) -> dict[str, object]:
    """One case by a plain loop. In two processes also the bytes that a layer sees while it computes."""
    model = qlora(checkpointing)
    base = model.get_base_model().model
    if WORLD == 1:
        return train(model)
    pack_nf4(model)
    whole = streams_of(model)
    if backend:
        for layer in base.layers:
            layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)
    shard_qlora(model, init_device_mesh("cpu", (WORLD,)), **options)
    shares = [module.weight.to_local().numel() for module in model.modules() if isinstance(module, StreamLinear4bit)]
    changed = {}

    def compare(name, module, args):
        changed[name] = changed.get(name, 0) + (stream_of(module.weight) != whole[name]).sum().item()

    if not backend:
        for name, module in model.named_modules():
            if isinstance(module, StreamLinear4bit):
                module.register_forward_pre_hook(partial(compare, name))
    found = train(model)
    return {
        **found,
        "changed": sum(changed.values()),
        "compared": len(changed),
        "share": 2 * sum(shares) / sum(len(stream) for stream in whole.values()),
    }


LOOPS = {
    "plain": {},
    "offload": {"offload": True},
    "checkpointing": {"checkpointing": True},
    "no resharding": {"reshard_after_forward": False},
    "sharded embeddings": {"shard_embeddings": True},
    "compiled": {"backend": "aot_eager"},
    "all": {"offload": True, "checkpointing": True, "backend": "aot_eager", "shard_embeddings": True},
}


def loops() -> dict[str, dict]:
    """Every case; "plain" with challenge A's kernel, the others with the formula."""
    if WORLD == 1:
        return {name: train(qlora(options.get("checkpointing", False))) for name, options in LOOPS.items()}
    found = {}
    for name, options in LOOPS.items():
        linear._OPS = torch.ops.unsloth_puzzles if name == "plain" else torch.ops.fsdp2_tests
        found[name] = loop(**options)
    return found


def main() -> None:
    kind, out = sys.argv[1:]
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo")
    found = {"loops": loops}[kind]()
    if RANK == 0:
        Path(out).write_text(json.dumps(found))
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
