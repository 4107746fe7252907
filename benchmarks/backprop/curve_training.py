"""One training of Llama 3.2 1B for `llama_curve`: model, optimiser and loop, repeatable to the last bit."""

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from benchmarks.backprop.curve_data import (
    FAULTS,
    OURS,
    PER_CHUNK,
    RUNS,
    SCALED,
    STANDARD,
    Settings,
    make_batches,
)
from benchmarks.models import llama_1b_config, load_llama, tiny_llama_config

_FLOAT16_SCALE = 2.0**13  # of the loss, at first: without it float16 gradients of activations vanish
_STEPS_A_LINE = 10
_WARMUP = 10  # steps of QLoRA over which AdamW's learning rate rises


def train(settings: Settings, run: str = OURS, say: Callable[[str], object] = print) -> dict:
    """One run in this process, from loading the weights on.

    Args:
        run: One of `RUNS[settings.mode]`.
        say: Is given a line of progress every ten steps.
    """
    settings = settings.decided()
    if run not in RUNS[settings.mode]:
        raise ValueError(f"run must be one of {RUNS[settings.mode]}, got {run!r}")
    _repeatable(settings)
    model, source, path, layers = _model(settings)
    rate = settings.learning_rate or _learning_rate(settings, source)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(settings, trained, rate)
    scaler = torch.amp.GradScaler(
        settings.device, init_scale=_FLOAT16_SCALE, enabled=settings.dtype == "float16"
    )  # does nothing where it is not enabled
    batches, text = make_batches(settings, path, model.config.vocab_size)
    steps = min(settings.steps, settings.fault_steps) if run in FAULTS else settings.steps
    before, start, losses, norms = _restart_peak(settings), time.perf_counter(), [], []
    with _our_loss(run, model, settings) as patch:
        for step in range(steps):
            if settings.mode == "qlora":
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / _WARMUP)
            loss, norm = _step(model, trained, optimizer, scaler, batches[step % len(batches)], settings, run)
            losses.append(loss)
            norms.append(norm)
            if (step + 1) % _STEPS_A_LINE == 0 or step + 1 == steps:
                seconds = time.perf_counter() - start
                say(f"{settings.mode}, {run}: step {step + 1} of {steps}, loss {loss.item():.4f}, {seconds:.1f} s")
    return {
        **dataclasses.asdict(settings),
        "run": run,
        "losses": torch.stack(losses).tolist(),
        "gradient_norms": [norm if math.isfinite(norm) else None for norm in torch.stack(norms).tolist()],
        "labels": [
            [int((each["labels"][:, 1:] != -100).sum()) for each in batches[step % len(batches)]]
            for step in range(steps)
        ],
        "learning_rate": rate,
        "weights": source,
        "layers": layers,
        "parameters": model.num_parameters(),
        "text": text,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else None,
        "before_gib": before,
        "seconds": time.perf_counter() - start,
        "loss_calls": patch.calls if patch else 0,
        "hardware": torch.cuda.get_device_name() if settings.device == "cuda" else "CPU",
    }


def _step(model, trained, optimizer, scaler, micro_batches, settings: Settings, run: str):
    """One optimiser step: its mean loss over all labels, and the gradients' norm. Nothing waits for the device."""
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches).to(settings.device)
    total = 0
    for batch in micro_batches:
        inputs = {name: value.to(settings.device, non_blocking=True) for name, value in batch.items()}
        if run == PER_CHUNK:
            loss = _loss_per_chunk(model, inputs, settings)
        else:
            loss = model(**inputs, num_items_in_batch=labels, use_cache=False).loss
        if run == SCALED:  # the same value, another gradient
            loss = loss.detach() + 1.01 * (loss - loss.detach())
        scaler.scale(loss).backward()
        total = total + loss.detach().float()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def _our_loss(run: str, model, settings: Settings):
    if run in (STANDARD, PER_CHUNK):
        return nullcontext()
    from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

    return use_memory_efficient_loss(model, chunk_size=settings.chunk_size)


def _loss_per_chunk(model, inputs: dict[str, torch.Tensor], settings: Settings) -> torch.Tensor:
    """The planted fault: the mean of the chunks' own means, though chunks hold different numbers of labels."""
    from unsloth_puzzles.backprop import memory_efficient_linear

    labels = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
    hidden_states = model.base_model(**inputs, use_cache=False).last_hidden_state  # [batch, length, hidden]
    chunks = (labels.flatten() != -100).split(settings.chunk_size)
    not_empty = sum(valid.any() for valid in chunks)
    weights = torch.cat([valid / valid.sum().clamp(min=1) for valid in chunks]) / not_empty  # [batch * length]
    return memory_efficient_linear(
        hidden_states,
        model.get_output_embeddings(),
        labels,
        _weighted_cross_entropy,
        row_args=(weights.view_as(labels),),
        reduction="sum",
        normalizer=settings.accumulation,
        chunk_size=settings.chunk_size,
    )


def _weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


def _repeatable(settings: Settings) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor with NaN


def _model(settings: Settings):
    """The model, its weights' source, the directory or hub name of its tokenizer, if any, and its layers' kind."""
    four_bit, dtype, layers = settings.mode == "qlora", getattr(torch, settings.dtype), "not quantised"
    config = tiny_llama_config(vocab_size=512) if settings.tiny else llama_1b_config()
    name = settings.weights or (None if not settings.tiny else "random")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the source is part of the result
        model, source = load_llama(
            name, device=settings.device, dtype=dtype, config=config, seed=settings.seed, four_bit=four_bit
        )
    model.set_attn_implementation("eager")
    if four_bit:
        from peft import LoraConfig, get_peft_model

        from unsloth_puzzles.nf4.patch import patch_linear4bit

        patch_linear4bit(model)
        layers = "NF4 by patch_linear4bit"
        torch.manual_seed(settings.seed)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)  # keeps the adapters in float32
    path = source.removeprefix("real weights, ") if source.startswith("real") else None
    return model.train(), source, path, layers


def _learning_rate(settings: Settings, source: str) -> float:
    """Small enough that training does not amplify rounding, large enough that 1 % of the gradient shows.

    Full fine-tuning of trained weights (SmolLM2-135M, float32, short sequences) at 0.01 amplified the differences to
    5e-3 within 60 steps; at 0.002 they stayed at 2e-5, and gradients x 1.01 differed by more than 1e-3 from step 6 on.
    """
    real = source.startswith("real")
    if settings.mode == "full":
        return 0.002 if real else 0.1 if settings.tiny else 0.01
    return 3e-3 if settings.tiny else 1e-4


def _optimizer(settings: Settings, parameters: list, rate: float) -> torch.optim.Optimizer:
    if settings.mode == "full":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=settings.device == "cuda")


def _restart_peak(settings: Settings) -> float | None:
    """GiB in use before the first step; loading, which took more for a moment, does not count as the peak."""
    if settings.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30
