"""A line of JSON a step: loss, gradient norm, tokens a second, peak memory of each rank."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback


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
