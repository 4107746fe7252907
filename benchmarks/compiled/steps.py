"""Time, memory and losses of QLoRA steps of Llama 3.2 1B: transformers + PEFT + bitsandbytes, and ours.

    python -m benchmarks.compiled.steps --candidate compiled --checkpointing --out steps.json

As a script each candidate has a process of its own; the notebook makes all runs in one, and takes off what others hold
of the memory (`held_bytes`). "eager" is transformers' model with PEFT's adapters over bitsandbytes' layers and the
standard loss; "compiled" the same model under `compile_qlora`. PARTS is "eager" with two parts of "compiled", the
kernel of challenge A and the loss of challenge E, but without compiled layers. All read the same bytes of Python's
language reference, each byte a token.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.compiled.clock import free_pinned, kernels_of, milliseconds, now, pinned_gib
from benchmarks.compiled.model import qlora_model, renew, text_batch
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss
from unsloth_puzzles.bench import memory
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4.patch import patch_linear4bit

CANDIDATES = ("eager", "compiled")
PARTS = "eager, A's kernel and E's loss"
WARM = 2  # steps
_NO_SETTINGS = ("lengths", "ready", "model", "held_bytes")
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
    weights: str | None = None,
    checkpointing: bool = False,
    attention: str = "auto",
    sdpa: str | None = None,
    activation_memory_budget: float = 0.9,
    max_autotune: bool = False,
    eager_rounding: bool = True,
    memory_gib: float | None = None,
    profile: bool = False,
    tiny: bool = False,
    model: torch.nn.Module | None = None,
    held_bytes: int = 0,
    ready: Callable[[], None] = lambda: None,
) -> dict:
    """Train one step for each of `lengths`, with AdamW on adapters of rank 16 under every linear layer.

    model: what `qlora_model` gave, made new by `renew` for this run; without it one is loaded. held_bytes: of the GPU's
    memory, allocated by others, which is no part of the peaks.
    attention: of a compiled run a backend of ours, of an eager run transformers' `attn_implementation` (or "auto").
    weights: the dtype that the weights are drawn in, if not `dtype`: so runs in two dtypes have the same ones.
    sdpa: the one kernel that PyTorch's SDPA may take ("flash", "efficient", "cudnn", "math"), else its own choice.
    memory_gib: of the GPU's memory, no more. profile: run one more step under PyTorch's profiler. ready: called after
    the first two steps, which compile.

    Returns "losses"; "step_ms", each step's from its beginning to its end on the GPU's clock, while the host goes on to
    the next step, as in a training loop that does not read each loss; "step_peak_gib", all that was allocated in each;
    "peak_gib", their largest; "pinned_gib" of the host's memory once compiled; "compilations", "captures",
    "graph_breaks", "compile_seconds"; with max_autotune "products", what was benchmarked; with `profile` "kernels", for
    each of `KINDS` the GPU's time and the launches of a step; and the settings.
    """
    if candidate not in (*CANDIDATES, PARTS):
        raise ValueError(f"candidate must be one of {', '.join(map(repr, (*CANDIDATES, PARTS)))}, got {candidate!r}")
    if sdpa is not None and sdpa not in KERNELS:
        raise ValueError(f"sdpa must be None or one of {', '.join(map(repr, KERNELS))}, got {sdpa!r}")
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    settings = {name: value for name, value in locals().items() if name not in _NO_SETTINGS}
    if memory_gib and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    if model is None:
        model = qlora_model(device, getattr(torch, dtype), tiny, getattr(torch, weights or dtype))
    renew(model, getattr(torch, dtype), checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    options = {"attention": attention, "activation_memory_budget": activation_memory_budget}
    options |= {"max_autotune": max_autotune, "eager_rounding": eager_rounding}
    losses, times, peaks = [], [], []
    batches = [text_batch(batch, length, number, device) for number, length in enumerate(lengths)]
    with (
        _attention_of(model, candidate, attention),
        count_compilations() as counts,
        compile_qlora(model, **options) if candidate == "compiled" else contextlib.nullcontext() as compiled,
        sdpa_kernel(KERNELS[sdpa]) if sdpa else contextlib.nullcontext(),
        patch_linear4bit(model) if candidate == PARTS else contextlib.nullcontext(),
        use_memory_efficient_loss(model, compile=device == "cuda") if candidate == PARTS else contextlib.nullcontext(),
    ):
        for number, inputs in enumerate(batches):
            if number == WARM:
                if device == "cuda":
                    free_pinned()  # what the compiler has pinned, to benchmark kernels that write in place, is no part
                ready()
            if device == "cuda":
                memory.reset_peak()
            start = now(device)
            losses.append(_step(model, optimizer, scaler, inputs, dtype))
            times.append((start, now(device)))
            if device == "cuda":
                peaks.append((torch.cuda.max_memory_allocated() - held_bytes) / 2**30)
        kernels = {}
        if profile and device == "cuda":
            kernels = kernels_of(lambda: _step(model, optimizer, scaler, inputs, dtype))
    return {
        **settings,
        "lengths": list(lengths),
        "losses": [loss.item() for loss in losses],
        "step_ms": [milliseconds(start, end) for start, end in times],
        "step_peak_gib": peaks,
        "peak_gib": max(peaks, default=None),
        "pinned_gib": pinned_gib() if device == "cuda" else None,
        "compilations": counts.compilations,
        "captures": [dataclasses.asdict(one) for one in counts.captures],
        "products": [dataclasses.asdict(one) for one in compiled.products] if compiled else [],
        "kernels": kernels,
        "graph_breaks": counts.graph_breaks,
        "compile_seconds": counts.seconds,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def step_ms(run: dict) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the second half of the steps: compiled and warm."""
    times = run["step_ms"][len(run["step_ms"]) // 2 :]
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return statistics.median(times), tenths[0], tenths[-1]


@contextlib.contextmanager
def _attention_of(model, candidate: str, attention: str) -> Iterator[None]:
    """An uncompiled run's `attn_implementation` while the block runs, whatever happens in it."""
    before = model.config._attn_implementation
    if candidate != "compiled" and attention != "auto":
        model.get_base_model().set_attn_implementation(attention)
    try:
        yield
    finally:
        model.get_base_model().set_attn_implementation(before)


def largest_difference(one: dict, other: dict) -> float:
    """The largest difference of two runs' losses over the steps that both have made.

    Raises:
        ValueError: A loss is not finite, or there is none: such runs are not alike.
    """
    pairs = list(zip(one["losses"], other["losses"], strict=False))
    if not pairs or not all(math.isfinite(loss) for pair in pairs for loss in pair):
        raise ValueError(f"losses must be finite, got {one['losses']} and {other['losses']}")
    return max(abs(a - b) for a, b in pairs)


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
    parser.add_argument("--weights")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--sdpa", choices=KERNELS)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--activation-memory-budget", type=float, default=0.9)
    for flag in ("checkpointing", "max-autotune", "eager-rounding", "profile", "tiny"):
        default = flag == "eager-rounding"
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=default)
    run(parser, measure)


def run(parser: argparse.ArgumentParser, measure: Callable[..., dict]) -> None:
    """Give `measure` what the command line says, and write what it returns. With --wait the run says on the standard
    output when it is ready, and waits for a line from whoever started it."""
    parser.add_argument("--wait", action="store_true", help="after the steps that compile say so, and wait for a line")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    given = vars(parser.parse_args())
    out, ready = Path(given.pop("out")), _wait if given.pop("wait") else lambda: None
    write_json(out, measure(**given, ready=ready))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
