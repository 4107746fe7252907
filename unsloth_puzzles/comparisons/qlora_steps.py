"""Time, memory and losses of QLoRA steps of Llama 3.2 1B: transformers + PEFT + bitsandbytes, and ours.

    python -m unsloth_puzzles.comparisons.qlora_steps --candidate compiled --checkpointing --out steps.json

Each candidate runs in a process of its own, for its peak memory is that process's. "eager" is transformers' model with
PEFT's adapters over bitsandbytes' layers and the standard loss; "compiled" the same model under `compile_qlora`. Both
read the same bytes of Python's language reference, each byte a token.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsloth_puzzles.bench.models import SEED, llama_1b_config, random_nf4_llama, tiny_llama_config
from unsloth_puzzles.bench.text import paragraphs
from unsloth_puzzles.compiled.count import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora

CANDIDATES = ("eager", "compiled")
WARM = 2  # steps
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(
    candidate: str,
    *,
    batch: int = 4,
    lengths: tuple[int, ...] = (2048,) * 20,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    attention: str = "auto",
    sdpa: str | None = None,
    activation_memory_budget: float = 0.9,
    max_autotune: bool = False,
    eager_rounding: bool = False,
    memory_gib: float | None = None,
    tiny: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> dict:
    """Train one step for each of `lengths`, with AdamW on adapters of rank 16 under every linear layer.

    sdpa: the one kernel that PyTorch's SDPA may take ("flash", "efficient", "cudnn", "math"), else its own choice.
    memory_gib: of the GPU's memory, no more. ready: called after the first two steps, which compile.

    Returns "losses"; "step_ms", each step's, by the clock, waited for; "step_peak_gib", all that was allocated in each;
    "peak_gib", their largest; "pinned_gib" of the host's memory once compiled; "compilations", "captures",
    "graph_breaks", "compile_seconds"; with max_autotune "products", what was benchmarked, and "triton_launches" of
    matrix products in a step, by the profiler; and the settings.
    """
    if candidate not in CANDIDATES:
        raise ValueError(f"candidate: got {candidate!r}, need one of {', '.join(map(repr, CANDIDATES))}")
    if sdpa is not None and sdpa not in KERNELS:
        raise ValueError(f"sdpa: got {sdpa!r}, need None or one of {', '.join(map(repr, KERNELS))}")
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    settings = {name: value for name, value in locals().items() if name not in ("lengths", "ready")}
    if memory_gib and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    model = qlora_model(device, getattr(torch, dtype), checkpointing, tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    options = {"attention": attention, "activation_memory_budget": activation_memory_budget}
    options |= {"max_autotune": max_autotune, "eager_rounding": eager_rounding}
    losses, times, peaks = [], [], []
    with (
        count_compilations() as counts,
        compile_qlora(model, **options) if candidate == "compiled" else contextlib.nullcontext() as compiled,
        sdpa_kernel(KERNELS[sdpa]) if sdpa else contextlib.nullcontext(),
    ):
        for number, length in enumerate(lengths):
            if number == WARM:
                if device == "cuda":
                    _pinned_gib()  # what the compiler has pinned, to benchmark kernels that write in place, is no part
                ready()
            inputs = _batch(batch, length, number, device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(_step(model, optimizer, scaler, inputs, dtype))
            if device == "cuda":
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated() / 2**30)
            times.append(1e3 * (time.perf_counter() - start))
        launches = None
        if max_autotune and device == "cuda":
            launches = _triton_launches(lambda: _step(model, optimizer, scaler, inputs, dtype))
    return {
        **settings,
        "lengths": list(lengths),
        "losses": [loss.item() for loss in losses],
        "step_ms": times,
        "step_peak_gib": peaks,
        "peak_gib": max(peaks, default=None),
        "pinned_gib": _pinned_gib() if device == "cuda" else None,
        "compilations": counts.compilations,
        "captures": [dataclasses.asdict(one) for one in counts.captures],
        "products": [dataclasses.asdict(one) for one in compiled.products] if compiled else [],
        "triton_launches": launches,
        "graph_breaks": counts.graph_breaks,
        "compile_seconds": counts.seconds,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def qlora_model(device: str, dtype: torch.dtype, checkpointing: bool, tiny: bool):
    """Llama 3.2 1B (or a tiny one) in NF4 from fixed-seed weights, with adapters of rank 16 under all linear layers."""
    config = tiny_llama_config() if tiny else llama_1b_config()
    model = random_nf4_llama(config, device, dtype)
    model.config.use_cache = False
    torch.manual_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _batch(size: int, length: int, number: int, device: str) -> dict[str, torch.Tensor]:
    starts = torch.randint(len(_text()) - length, (size,), generator=torch.Generator().manual_seed(SEED + number))
    ids = torch.stack([_text()[start : start + length] for start in starts.tolist()]).to(device)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def _text() -> torch.Tensor:
    return torch.tensor(list("\n".join(paragraphs()).encode()))


def _step(model, optimizer, scaler, inputs: dict, dtype: str) -> torch.Tensor:
    with torch.autocast(inputs["input_ids"].device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _triton_launches(step: Callable) -> int:
    """Matrix products of one step that were launched as Triton kernels made from Inductor's templates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("triton_tem"))


def _pinned_gib() -> float | None:
    """The most that was pinned of the host's memory since the last call; None if this PyTorch does not tell."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)()
    if "active_bytes.peak" not in stats:
        return None
    torch.cuda.memory.reset_peak_host_memory_stats()
    return stats["active_bytes.peak"] / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA steps of one candidate.")
    parser.add_argument("--candidate", choices=CANDIDATES, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=(2048,) * 20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--sdpa", choices=KERNELS)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--activation-memory-budget", type=float, default=0.9)
    for flag in ("checkpointing", "max-autotune", "eager-rounding", "tiny"):
        parser.add_argument(f"--{flag}", action="store_true")
    run(parser, measure)


def run(parser: argparse.ArgumentParser, measure: Callable[..., dict]) -> None:
    """Give `measure` what the command line says, and write what it returns. With --wait the run says on the standard
    output when it is ready, and waits for a line from whoever started it."""
    parser.add_argument("--wait", action="store_true", help="after the steps that compile say so, and wait for a line")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    given = vars(parser.parse_args())
    out, ready = Path(given.pop("out")), _wait if given.pop("wait") else lambda: None
    out.write_text(json.dumps(measure(**given, ready=ready)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
