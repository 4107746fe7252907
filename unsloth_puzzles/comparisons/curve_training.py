"""One training of Llama 3.2 1B for `llama_curve`: settings, model, optimiser and loop, repeatable to the last bit."""

import dataclasses
import os
import time
import warnings
from contextlib import nullcontext

import torch

from unsloth_puzzles.bench.models import SEED, llama_1b_config, load_llama, tiny_llama_config
from unsloth_puzzles.comparisons.curve_data import make_batches

MODES, LOSSES, OPTIMIZERS = ("full", "qlora"), ("standard", "ours"), ("adamw", "adamw8bit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training. None is decided where it runs: see `decided`.

    `batch` sequences of at most `length` tokens make a micro-batch, `accumulation` of those a step. `weights` is a
    directory or a name on the hub, "" for Llama 3.2 1B's mirror, "random" for fixed-seed weights without asking. The
    learning rate rises linearly over the first `warmup` steps. `chunk_size` goes to our loss.
    """

    mode: str = "full"
    loss: str = "standard"
    steps: int = 100
    batch: int | None = None
    length: int | None = None
    accumulation: int = 2
    weights: str = ""
    tiny: bool | None = None
    device: str | None = None
    dtype: str | None = None
    learning_rate: float | None = None
    warmup: int = 10
    optimizer: str = "adamw"
    chunk_size: int = 256
    seed: int = SEED

    def decided(self) -> "Settings":
        """With what depends on machine and mode. Raises ValueError naming what is wrong.

        A CPU gets a tiny model. Both modes compute in float32, so that what differs between two runs is the loss alone:
        in bfloat16 sums taken in another order were 1.5e-2 apart after 100 steps of QLoRA (1B, H200). A GPU without
        bfloat16, a T4, is too slow for that: it gets float16, and more tokens, whose mean evens out the rounding.
        """
        for name, known in (("mode", MODES), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: needs one of {known}, got {getattr(self, name)!r}")
        for name, least in {
            "steps": 1,
            "batch": 1,
            "length": 8,
            "accumulation": 1,
            "warmup": 1,
            "chunk_size": 1,
        }.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}: needs {least} or more, got {getattr(self, name)}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        slow = device != "cpu" and torch.cuda.get_device_capability() < (8, 0)
        dtype = self.dtype or ("float16" if slow and self.mode == "qlora" else "float32")
        return dataclasses.replace(
            self,
            device=device,
            tiny=device == "cpu" if self.tiny is None else self.tiny,
            dtype=dtype,
            batch=self.batch or (2 if dtype == "float32" else 8),
            length=self.length or (192 if dtype == "float32" else 256),
        )


def train(settings: Settings) -> dict:
    """The training itself, in this process: see `llama_curve.run` for what it returns."""
    settings = settings.decided()
    _repeatable(settings)
    model, source, path = _model(settings)
    rate = settings.learning_rate or _learning_rate(settings, source)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(settings, trained, rate)
    # float16 gradients of activations vanish without it; it does nothing for other dtypes.
    scaler = torch.amp.GradScaler(settings.device, init_scale=2.0**13, enabled=settings.dtype == "float16")
    batches, text = make_batches(settings, path, model.config.vocab_size)
    before, losses, start = _restart_peak(settings), [], time.perf_counter()
    with _our_loss(model, settings) as patch:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / settings.warmup)
            losses.append(_step(model, optimizer, scaler, batches[step], settings.device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else None
    return {
        **dataclasses.asdict(settings),
        "losses": torch.stack(losses).tolist(),
        "labels": [[int((each["labels"][:, 1:] != -100).sum()) for each in batch] for batch in batches],
        "learning_rate": rate,
        "weights": source,
        "text": text,
        "peak_gib": peak,
        "before_gib": before,
        "seconds": time.perf_counter() - start,
        "loss_calls": patch.calls if patch else 0,
        "hardware": torch.cuda.get_device_name() if settings.device == "cuda" else "CPU",
    }


def _step(model, optimizer, scaler, micro_batches, device) -> torch.Tensor:
    """One optimiser step; its loss, the mean over the labels of all its micro-batches, which is not waited for."""
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches).to(device)
    total = 0
    for batch in micro_batches:
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        loss = model(**inputs, num_items_in_batch=labels, use_cache=False).loss
        scaler.scale(loss).backward()
        total = total + loss.detach().float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def _our_loss(model, settings: Settings):
    if settings.loss == "standard":
        return nullcontext()
    from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

    return use_memory_efficient_loss(model, chunk_size=settings.chunk_size)


def _repeatable(settings: Settings) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor with NaN


def _model(settings: Settings):
    """The model to train, its weights' source, and the directory or name that has a tokenizer for it, if any."""
    four_bit, dtype = settings.mode == "qlora", getattr(torch, settings.dtype)
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
        torch.manual_seed(settings.seed)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)  # keeps the adapters in float32
    path = source.removeprefix("real weights, ") if source.startswith("real") else None
    return model.train(), source, path


def _learning_rate(settings: Settings, source: str) -> float:
    """Such that sums taken in another order stay apart by no more than rounding: a higher rate amplifies it.

    100 steps of the tiny model at 1e-3: 1e-6, at 3e-3: 6e-4. QLoRA of 1B random weights at 1e-3: 1e-6 for 60 steps, in
    which the loss falls to its plateau, then growing a hundredfold every 20 steps (H200).
    """
    if settings.tiny:
        return 1e-3 if settings.mode == "full" else 3e-3
    real = source.startswith("real")
    return {"full": 1e-5 if real else 1e-4, "qlora": 2e-4 if real else 3e-4}[settings.mode]


def _optimizer(settings: Settings, parameters: list, rate: float) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=settings.device == "cuda")


def _restart_peak(settings: Settings) -> float | None:
    """GiB in use before the first step; loading, which took more for a moment, does not count as the peak."""
    if settings.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30
