"""Time, memory and losses of QLoRA steps of Llama 3.2 1B: transformers + PEFT + bitsandbytes, and ours.

    python -m unsloth_puzzles.comparisons.qlora_steps --candidate compiled --checkpointing --out steps.json

Each candidate runs in a process of its own, for its peak memory is that process's. "eager" is transformers' model with
PEFT's adapters over bitsandbytes' layers and the standard loss; "compiled" the same model under `compile_qlora`.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from unsloth_puzzles.bench.models import SEED, llama_1b_config, random_nf4_llama, tiny_llama_config
from unsloth_puzzles.compiled.count import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora

CANDIDATES = ("eager", "compiled")


def measure(
    candidate: str,
    *,
    batch: int = 4,
    lengths: tuple[int, ...] = (2048,) * 20,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    attention: str = "auto",
    activation_memory_budget: float = 0.9,
    max_autotune: bool = False,
    tiny: bool = False,
) -> dict:
    """Train one step for each of `lengths`, with AdamW on adapters of rank 16 under every linear layer.

    Returns "losses", "step_ms" (each step's, by the clock, waited for), "step_ms_median" (of the second half),
    "peak_gib" (all of the process's allocations), "compilations", "graph_breaks", "compile_seconds", and the settings.
    """
    if candidate not in CANDIDATES:
        raise ValueError(f"candidate: got {candidate!r}, need one of {', '.join(map(repr, CANDIDATES))}")
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    settings = {name: value for name, value in locals().items() if name != "lengths"}
    model = _model(device, getattr(torch, dtype), checkpointing, tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    options = {"attention": attention, "activation_memory_budget": activation_memory_budget}
    options |= {"max_autotune": max_autotune}
    losses, times = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        count_compilations() as counts,
        compile_qlora(model, **options) if candidate == "compiled" else contextlib.nullcontext(),
    ):
        for number, length in enumerate(lengths):
            start = time.perf_counter()
            losses.append(_step(model, optimizer, scaler, _batch(model, batch, length, number, device), dtype))
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return {
        **settings,
        "lengths": list(lengths),
        "losses": [loss.item() for loss in losses],
        "step_ms": times,
        "step_ms_median": statistics.median(times[len(times) // 2 :]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "compilations": [[one.name, one.forward, one.reason, one.seconds] for one in counts.compilations],
        "graph_breaks": counts.graph_breaks,
        "compile_seconds": counts.seconds,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def _model(device: str, dtype: torch.dtype, checkpointing: bool, tiny: bool):
    config = tiny_llama_config() if tiny else llama_1b_config()
    model = random_nf4_llama(config, device, dtype)
    model.config.use_cache = False
    torch.manual_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _batch(model, size: int, length: int, number: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED + number)
    ids = torch.randint(model.config.vocab_size, (size, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def _step(model, optimizer, scaler, inputs: dict, dtype: str) -> torch.Tensor:
    with torch.autocast(inputs["input_ids"].device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA steps of one candidate.")
    parser.add_argument("--candidate", choices=CANDIDATES, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=(2048,) * 20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--activation-memory-budget", type=float, default=0.9)
    for flag in ("checkpointing", "max-autotune", "tiny"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--out", required=True)
    given = vars(parser.parse_args())
    out = Path(given.pop("out"))
    out.write_text(json.dumps(measure(**given)))


if __name__ == "__main__":
    main()
