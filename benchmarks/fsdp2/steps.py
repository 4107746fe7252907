"""Steps of QLoRA at Llama 3.1 8B's layer shapes, on one GPU and on several by FSDP2: time, memory, losses.

    python -m benchmarks.fsdp2.steps OUT CASES.json
    torchrun --nproc_per_node 2 -m benchmarks.fsdp2.steps OUT CASES.json

CASES.json is a list of keyword arguments of `measure`. Every case draws the same weights, adapters and rows.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig

from benchmarks.models import random_nf4_llama
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora
from unsloth_puzzles.nf4.patch import patch_linear4bit

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def llama_8b_config(layers: int, vocabulary: int = 128256) -> LlamaConfig:
    """The layer shapes of Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip


def measure(
    *,
    rows: int,
    length: int = 2048,
    layers: int = 16,
    vocabulary: int = 128256,
    steps: int = 8,
    dtype: str = "bfloat16",
    kernels: str = "ours",
    compiled: bool = False,
    checkpointing: bool = True,
    offload: bool = False,
    reshard_after_forward: bool = True,
    shard_embeddings: bool = False,
    seed: int = 5,
) -> dict:
    """Train `steps` steps of `rows` rows a GPU.

    Args:
        rows: Of each GPU; with one GPU, of all.
        length: Tokens of a row.
        layers: Of the model.
        vocabulary: Of the model.
        steps: With AdamW; the first half is warm-up.
        dtype: That everything but the adapters computes in.
        kernels: "ours" or "bitsandbytes", for de-quantisation on one GPU.
        compiled: By `compile_qlora`.
        checkpointing: Compute activations again in the backward.
        offload: See `shard_qlora`, as for the next two.
        reshard_after_forward: See there.
        shard_embeddings: See there.
        seed: Of the rows.

    Returns:
        The settings; "losses" over all rows and "norms" of the gradients a step; "step_ms", all of them; "tokens_per_s"
        of all GPUs, of the median step; "rest_gib" allocated between steps and "peak_gib" of this rank; "share" of the
        4-bit bytes that this rank holds; "compilations" and "graph_breaks".
    """
    settings = dict(locals())
    device, kind = torch.device("cuda", torch.cuda.current_device()), getattr(torch, dtype)
    model = random_nf4_llama(llama_8b_config(layers, vocabulary), device, kind)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator(device).manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape, device=device, generator=generator)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with contextlib.ExitStack() as stack:
        if WORLD > 1:
            pack_nf4(model)
        whole = sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, StreamLinear4bit))
        counts = stack.enter_context(count_compilations())
        if compiled:
            stack.enter_context(compile_qlora(model))
        elif WORLD == 1 and kernels == "ours":
            stack.enter_context(patch_linear4bit(model))
        if WORLD > 1:
            options = {"offload": offload, "shard_embeddings": shard_embeddings}
            shard_qlora(model, _mesh(), reshard_after_forward=reshard_after_forward, param_dtype=kind, **options)
        found = _train(model, rows, length, vocabulary, steps, kind, seed)
    packed = [module.weight for module in model.modules() if isinstance(module, StreamLinear4bit)]
    held = sum(2 * weight.to_local().numel() for weight in packed) if WORLD > 1 else whole
    found |= {"share": held / whole if whole else 1.0, "compilations": counts.compilations}
    return {**settings, "world": WORLD, **found, "graph_breaks": counts.graph_breaks}


def _mesh() -> DeviceMesh:
    return DeviceMesh.from_group(dist.group.WORLD, "cuda")


def _train(model, rows: int, length: int, vocabulary: int, steps: int, dtype: torch.dtype, seed: int) -> dict:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=all(p.is_cuda for p in trained))
    generator, times, losses, norms = torch.Generator().manual_seed(seed), [], [], []
    for step in range(steps):
        ids = torch.randint(0, vocabulary, (rows * WORLD, length), generator=generator)  # [all rows, length]
        own = ids.chunk(WORLD)[RANK].cuda()
        if step == steps // 2:
            torch.cuda.reset_peak_memory_stats()
        _wait()
        began = time.perf_counter()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=own, labels=own).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
        mean = loss.detach().clone()
        if WORLD > 1:
            dist.all_reduce(mean, op=dist.ReduceOp.AVG)
            norm = norm.full_tensor()
        losses.append(mean.item())
        norms.append(norm.item())
    middle = statistics.median(times[steps // 2 :])
    return {
        "losses": losses,
        "norms": norms,
        "step_ms": times,
        "tokens_per_s": rows * WORLD * length / middle * 1e3,
        "rest_gib": torch.cuda.memory_allocated() / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _wait() -> None:
    torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("cuda:nccl,cpu:gloo")
    found = []
    for case in cases:
        try:
            found.append(measure(**case))
        except torch.OutOfMemoryError as error:
            found.append({**case, "world": WORLD, "error": str(error).splitlines()[0]})
        torch.cuda.empty_cache()
        if RANK == 0:
            out.write_text(json.dumps(found))
            one = found[-1]
            shown = {key: one.get(key) for key in ("rows", "compiled", "tokens_per_s", "peak_gib", "error")}
            print("RESULT", shown, [round(ms) for ms in one.get("step_ms", [])], flush=True)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
