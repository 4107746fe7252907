"""Time, memory and losses of QLoRA steps of Llama 3.2 1B: transformers + PEFT + bitsandbytes, and ours.

    python -m benchmarks.compiled.steps --candidate compiled --checkpointing --out steps.json

As a script each candidate has a process of its own; the notebook makes all runs in one, and takes off what others hold
of the memory (`held_bytes`). "eager" is transformers' model with PEFT's adapters over bitsandbytes' layers and the
standard loss; "compiled" the same model under `compile_qlora`. Both read the same bytes of Python's language reference,
each byte a token.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models import SEED, llama_1b_config, random_nf4_llama, tiny_llama_config
from benchmarks.text import paragraphs
from unsloth_puzzles.compiled.count import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora

CANDIDATES = ("eager", "compiled")
WARM = 2  # steps
_NO_SETTINGS = ("lengths", "ready", "model", "held_bytes")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
KINDS = {  # of what runs on a GPU, by what its name contains; the first that fits
    "copies to and from the host": ("memcpy htod", "memcpy dtoh"),
    "attention": ("flash", "fmha", "sdpa", "flex"),
    "Triton's products": ("triton_tem",),  # made from Inductor's templates
    "cuBLAS's products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "de-quantisation": ("dequant",),
    "all else": ("",),
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
    if candidate not in CANDIDATES:
        raise ValueError(f"candidate: got {candidate!r}, need one of {', '.join(map(repr, CANDIDATES))}")
    if sdpa is not None and sdpa not in KERNELS:
        raise ValueError(f"sdpa: got {sdpa!r}, need None or one of {', '.join(map(repr, KERNELS))}")
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
    ):
        for number, inputs in enumerate(batches):
            if number == WARM:
                if device == "cuda":
                    _free_pinned()  # what the compiler has pinned, to benchmark kernels that write in place, is no part
                ready()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = _now(device)
            losses.append(_step(model, optimizer, scaler, inputs, dtype))
            times.append((start, _now(device)))
            if device == "cuda":
                peaks.append((torch.cuda.max_memory_allocated() - held_bytes) / 2**30)
        kernels = {}
        if profile and device == "cuda":
            kernels = _kernels(lambda: _step(model, optimizer, scaler, inputs, dtype))
    return {
        **settings,
        "lengths": list(lengths),
        "losses": [loss.item() for loss in losses],
        "step_ms": [_ms(start, end) for start, end in times],
        "step_peak_gib": peaks,
        "peak_gib": max(peaks, default=None),
        "pinned_gib": _pinned_gib() if device == "cuda" else None,
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
    if candidate == "eager" and attention != "auto":
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


def qlora_model(device: str, dtype: torch.dtype, tiny: bool, drawn: torch.dtype | None = None):
    """Llama 3.2 1B (or a tiny one) in NF4 from fixed-seed weights, with adapters of rank 16 under all linear layers.

    dtype: what it computes in. drawn: what the weights are drawn in, `dtype` if None.
    """
    config = tiny_llama_config() if tiny else llama_1b_config()
    model = random_nf4_llama(config, device, drawn or dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()  # as `prepare_model_for_kbit_training` does: no layer differs from the others
    return renew(model, dtype)


def renew(model: torch.nn.Module, dtype: torch.dtype, checkpointing: bool = False) -> torch.nn.Module:
    """The model as before its first step, to compute in `dtype`: adapters drawn anew, packed weights as they are.

    The adapters stay in float32. The other weights must have been drawn in a dtype whose values `dtype` holds.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    torch.manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", True)
    for parameter in model.parameters():
        parameter.grad = None
    base = model.get_base_model()
    if checkpointing and not base.is_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif base.is_gradient_checkpointing and not checkpointing:
        base.gradient_checkpointing_disable()
    return model.train()


def text_batch(size: int, length: int, number: int, device: str) -> dict[str, torch.Tensor]:
    """Batch `number`: `size` stretches of the text, each byte a token and its own label."""
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


def _now(device: str) -> float | torch.cuda.Event:
    """A point in time; on a GPU, when it has done what it has been given until now."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start, end) -> float:
    if isinstance(end, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def _kernels(step: Callable) -> dict[str, dict]:
    """{kind: {"ms", "launches"}} of one step, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = {kind: {"ms": 0.0, "launches": 0} for kind in KINDS}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # not the host's calls that start them
            kind = next(kind for kind, signs in KINDS.items() if any(sign in event.name.lower() for sign in signs))
            found[kind]["ms"] += event.self_device_time_total / 1e3
            found[kind]["launches"] += 1
    return found


def _free_pinned() -> None:
    """Give back the pinned memory that is kept for reuse."""
    torch.cuda.synchronize()
    torch._C._host_emptyCache()


def _pinned_gib() -> float | None:
    """What is pinned of the host's memory, in use or kept for reuse; None if this PyTorch does not tell."""
    found = getattr(torch.cuda, "host_memory_stats", dict)().get("allocated_bytes.current")
    return None if found is None else found / 2**30


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
    out.write_text(json.dumps(measure(**given, ready=ready)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
