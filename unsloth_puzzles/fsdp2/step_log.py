"""What a run says of itself: a line of JSON a step (loss, gradient norm, tokens a second, peaks), and a summary."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from unsloth_puzzles.bench.compilations import Counts
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit


class StepLog(TrainerCallback):
    """Writes a line of JSON a step, from the first rank."""

    def __init__(self, path: str | None, tokens: int):
        self.path, self.tokens, self.began = Path(path) if path else None, tokens, time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.began  # logging has waited for the loss
        peaks = [torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, peaks[0])
            peaks = gathered
        line = {"step": state.global_step, "loss": logs["loss"], "grad_norm": logs.get("grad_norm")}
        line |= {"seconds": seconds, "tokens_per_s": self.tokens / seconds, "peak_gib": peaks}
        if state.is_world_process_zero and self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def write_summary(path: str, model: nn.Module, counts: Counts) -> None:
    """Write {"share", "compilations", "graph_breaks"} of this rank as JSON.

    Args:
        path: The file.
        model: Trained; "share" is the part of its packed 4-bit bytes that this rank holds, 1.0 without any.
        counts: Of the training.
    """
    streams = [module.weight for module in model.modules() if isinstance(module, StreamLinear4bit)]
    whole = sum(weight.numel() for weight in streams)
    held = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in streams)
    found = {"share": held / whole if whole else 1.0, "compilations": counts.compilations}
    write_json(path, {**found, "graph_breaks": sum(counts.graph_breaks.values())})
