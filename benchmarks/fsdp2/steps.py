"""Steps of QLoRA at Llama 3.1 8B's layer shapes, on one GPU and on several by FSDP2: time, memory, losses.

    python -m benchmarks.fsdp2.steps OUT CASES.json
    torchrun --nproc_per_node 2 -m benchmarks.fsdp2.steps OUT CASES.json

CASES.json is a list of keyword arguments of `measure`. Every case draws the same weights, adapters and rows.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig

from benchmarks.fsdp2 import ranks
from benchmarks.fsdp2.collectives import GATHER, known
from benchmarks.fsdp2.ranks import RANK, WORLD
from benchmarks.fsdp2.shapes import SHAPES
from benchmarks.fsdp2.training import Run
from benchmarks.models import random_nf4_llama
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora
from unsloth_puzzles.nf4.patch import patch_linear4bit

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shaped_config(shapes: str, layers: int, vocabulary: int) -> LlamaConfig:
    """A Llama with decoder layers of these SHAPES."""
    hidden, inner, heads, kv_heads = SHAPES[shapes]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip


def qlora_model(shapes: str, layers: int, vocabulary: int, dtype: torch.dtype, checkpointing: bool) -> PeftModel:
    """A Llama of these SHAPES in NF4 on this rank's device, with adapters whose B is not zero, in training."""
    device = ranks.device()
    model = random_nf4_llama(shaped_config(shapes, layers, vocabulary), device, dtype)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    generator = torch.Generator(device).manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape, device=device, generator=generator)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def measure(
    *,
    rows: int,
    length: int | Sequence[int] = 2048,
    shapes: str = "Llama 3.1 8B",
    layers: int = 16,
    vocabulary: int = 128256,
    steps: int = 8,
    accumulation: int = 1,
    dtype: str = "bfloat16",
    compiled: bool = False,
    checkpointing: bool = True,
    profiled: bool = False,
    dequantize: str = "ours",
    seed: int = 5,
    **sharding: bool,
) -> dict:
    """Train `steps` steps of `rows` rows a rank.

    Args:
        rows: Of each rank; with one process, of all.
        length: Tokens of a row; with several the steps take one after another.
        shapes: A key of SHAPES.
        layers: Of the model.
        vocabulary: Of the model.
        steps: With AdamW; the first half is warm-up.
        accumulation: Micro-batches of a step.
        dtype: That everything but the adapters computes in.
        compiled: By `compile_qlora`.
        checkpointing: Compute activations again in the backward.
        profiled: Make one more step under PyTorch's profiler.
        dequantize: Of one uncompiled process: "ours" is challenge A's kernel, "bitsandbytes" its own layers.
        seed: Of the rows.
        sharding: `offload`, `reshard_after_forward`, `shard_embeddings` of `shard_qlora`.

    Returns:
        The settings; "losses" over all rows and "norms" of the gradients a step; "step_ms", all of them; "tokens_per_s"
        of all ranks, of the median step; "held_gib" allocated before, "rest_gib" between steps, and "peak_gib" by rank;
        "share" of the 4-bit bytes that this rank holds; "compilations" and "graph_breaks"; "launches" of challenge A's
        kernel in the profiled step, beside "weights" and "passes" over each, and the step's "timeline";
        "plain_layers", how many layers are bitsandbytes' own.

    Raises:
        ValueError: An unknown `dequantize`, or "bitsandbytes" for several ranks or for a compiled model.
    """
    settings = dict(locals())
    if dequantize not in ("ours", "bitsandbytes"):
        raise ValueError(f"dequantize must be 'ours' or 'bitsandbytes', got {dequantize!r}")
    if dequantize == "bitsandbytes" and (WORLD > 1 or compiled):
        raise ValueError("dequantize must be 'ours' for several ranks and for a compiled model, got 'bitsandbytes'")
    kind = getattr(torch, dtype)
    held_gib = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None
    model = qlora_model(shapes, layers, vocabulary, kind, checkpointing)
    with contextlib.ExitStack() as stack:
        if WORLD > 1:
            pack_nf4(model)
        whole = sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, StreamLinear4bit))
        counts = stack.enter_context(count_compilations())
        if compiled:
            stack.enter_context(compile_qlora(model))
        elif WORLD == 1 and dequantize == "ours":
            stack.enter_context(patch_linear4bit(model))
        if WORLD > 1:
            shard_qlora(model, ranks.mesh(), param_dtype=None if kind == torch.float32 else kind, **sharding)
        lengths = [length] if isinstance(length, int) else length
        run = Run(model, rows, lengths, vocabulary, accumulation, kind, seed)
        found = run.train(steps)
        found["plain_layers"] = sum(type(module) is Linear4bit for module in model.modules())
        if profiled:
            found |= run.profile()
    packed = [module.weight for module in model.modules() if isinstance(module, StreamLinear4bit)]
    held = sum(2 * weight.to_local().numel() for weight in packed) if WORLD > 1 else whole
    found |= {"share": held / whole if whole else 1.0, "compilations": counts.compilations}
    found |= {"weights": len(TARGETS) * layers, "passes": 3 if checkpointing else 2}
    found |= {"world": WORLD, "held_gib": held_gib, "graph_breaks": sum(counts.graph_breaks.values())}
    return {**settings, **found}


def gather_bandwidth(megabytes: int = 128, rounds: int = 8) -> float:
    """Bytes a second that a rank receives in an all-gather of a decoder layer's size, the median of `rounds`."""
    share = torch.zeros(megabytes * 2**20 // WORLD, dtype=torch.uint8, device=ranks.device())
    whole, times = share.new_empty(len(share) * WORLD), []
    gather = getattr(dist, known(GATHER)[0])
    for _ in range(rounds + 2):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        gather(whole, share)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return len(share) * (WORLD - 1) / statistics.median(times[2:])


def main(out: str, cases: str) -> None:
    """Measure every case; the file is written after each. A case for which the memory does not suffice says so."""
    ranks.start()
    found = []
    for case in json.loads(Path(cases).read_text()):
        try:
            found.append(measure(**case))
        except torch.OutOfMemoryError as error:
            found.append({**case, "world": WORLD, "error": str(error).splitlines()[0]})
        torch.compiler.reset()  # compiled code holds models
        free_memory()
        if RANK == 0:
            write_json(out, {"cases": found})
            print(f"{'compiled' if case.get('compiled') else 'uncompiled'}: {_outcome(found[-1])}", flush=True)
    bandwidth = gather_bandwidth() if WORLD > 1 and torch.cuda.is_available() else None
    if RANK == 0:
        write_json(out, {"cases": found, "gather_bytes_per_s": bandwidth})
    ranks.finish()


def _outcome(found: dict) -> str:
    return found.get("error") or f"{len(found['losses'])} steps"  # not their time: others may run beside them


if __name__ == "__main__":
    main(*sys.argv[1:])
