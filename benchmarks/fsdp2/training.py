"""Training steps of a model whose every rank draws the same rows: losses, norms, times, memory, and a profile."""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from benchmarks.fsdp2 import ranks
from benchmarks.fsdp2.ranks import RANK, WORLD
from benchmarks.gpu_work import Work, gpu_work

SHOWN = 30  # steps from one line of progress to the next
DISTINCT = 6  # batches, which come again and again, so that a loss falls
KERNEL = "dequantize_nf4_kernel"  # in the names of challenge A's kernels
COPIES = ("memcpy", "memset", "multi_tensor_apply", "split_with_sizes", "chunk_cat")  # of FSDP2, in and out of buffers


class Run:
    """A model with its optimizer and its rows."""

    def __init__(self, model, rows: int, lengths: Sequence[int], vocabulary: int, accumulation: int, dtype, seed: int):
        self.model, self.rows, self.lengths, self.vocabulary = model, rows, lengths, vocabulary
        self.accumulation, self.dtype, self.device = accumulation, dtype, ranks.device()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = all(parameter.device.type == "cuda" for parameter in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.seed, self.drawn = seed, 0

    def train(self, steps: int) -> dict:
        times, losses, norms, gpu = [], [], [], self.device.type == "cuda"
        for step in range(steps):
            if gpu and step == steps // 2:
                torch.cuda.reset_peak_memory_stats()
            own = self._batch()
            self._wait()
            began = time.perf_counter()
            loss, norm = self._step(own)
            self._wait(barrier=False)
            times.append(1e3 * (time.perf_counter() - began))
            losses.append(ranks.average(loss))
            norms.append((norm.full_tensor() if WORLD > 1 else norm).item())
            if RANK == 0 and step % SHOWN == SHOWN - 1:
                print(f"step {step + 1} of {steps}: loss {losses[-1]:.4f}", flush=True)
        middle = statistics.median(times[steps // 2 :])
        return {
            "losses": losses,
            "norms": [norm if norm < float("inf") else None for norm in norms],
            "step_ms": times,
            "tokens_per_s": self.rows * WORLD * statistics.mean(self.lengths) / middle * 1e3,
            "rest_gib": torch.cuda.memory_allocated() / 2**30 if gpu else None,
            "peak_gib": _everyones(torch.cuda.max_memory_allocated() / 2**30 if gpu else None),
        }

    def profile(self) -> dict:
        """One more step: launches of challenge A's kernel, and when the GPU worked on what."""
        if self.device.type != "cuda":
            return {}
        own = self._batch()
        return of_step(gpu_work(lambda: self._step(own), before=self._wait))

    def _batch(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * DISTINCT + self.drawn % DISTINCT)
        size = (self.rows * WORLD, self.lengths[self.drawn % len(self.lengths)])
        self.drawn += 1
        ids = torch.randint(0, self.vocabulary, size, generator=generator)
        return ids.chunk(WORLD)[RANK].to(self.device)  # [rows, length]

    def _step(self, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = 0.0
        for number, batch in enumerate(own.chunk(self.accumulation), 1):
            if WORLD > 1:
                self.model.set_requires_gradient_sync(number == self.accumulation)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(input_ids=batch, labels=batch).loss / self.accumulation
            self.scaler.scale(loss).backward()
            total = total + loss.detach().float()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total, norm

    def _wait(self, barrier: bool = True) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if barrier and WORLD > 1:
            dist.barrier()


def of_step(work: list[Work]) -> dict:
    """Count a step's launches of challenge A's kernel, and put its work into lanes.

    Returns:
        "launches", and the "timeline" as a list of (lane, start, duration) in us from the step's first kernel on.
    """
    began = work[0].start
    timeline = [(_lane(one.name), round(one.start - began, 1), round(one.length, 1)) for one in work]
    return {"launches": sum(KERNEL in one.name for one in work), "timeline": timeline}


def _lane(name: str) -> str:
    lower = name.lower()
    if "nccl" not in lower:
        return "copies" if any(part in lower for part in COPIES) else "compute"
    return "all-gather" if "allgather" in lower else "reduce-scatter" if "reducescatter" in lower else "other"


def _everyones(value: float | None) -> list[float | None]:
    """By rank."""
    found = [value]
    if WORLD > 1:
        found = [None] * WORLD
        dist.all_gather_object(found, value)
    return found
