"""Flash attention over sequences of any lengths laid end to end: the one that PyTorch ships (torch 2.10 and later)."""

import torch

from unsloth_puzzles.attention.backend import Backend, document_starts, flat_positions
from unsloth_puzzles.attention.pattern import Batch, Pattern
from unsloth_puzzles.device import capability

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

_LARGEST_HEAD = 256


class Flash(Backend):
    """FlashAttention-2 (arXiv 2307.08691) by `torch.nn.attention.varlen.varlen_attn`: 16 bits, from sm_80 on."""

    name = "flash"
    features = frozenset({"window", "documents", "fullgraph"})
    memory = "none"

    def missing(self, device: torch.device) -> str | None:
        if varlen_attn is None:
            return "this torch has no torch.nn.attention.varlen"
        if capability(device) < 80:
            return "it needs a CUDA GPU from sm_80 on"
        return None

    def refuses(self, pattern: Pattern, batch: Batch) -> str | None:
        if batch.head_size > _LARGEST_HEAD or batch.head_size % 8:
            return f"flash cannot do head size {batch.head_size}, only multiples of 8 up to {_LARGEST_HEAD}"
        return super().refuses(pattern, batch)

    def prepare(self, pattern: Pattern, batch: Batch) -> torch.Tensor:
        starts = document_starts(batch)
        torch._dynamo.maybe_mark_dynamic(starts, 0)
        return starts

    def run(self, query, key, value, pattern: Pattern, data: torch.Tensor, scale: float | None) -> torch.Tensor:
        size, _, length, _ = query.shape
        # Its left size counts the keys before the query's own.
        left = -1 if pattern.window is None else pattern.window - 1
        window = (left, 0 if pattern.causal else -1)
        out = varlen_attn(
            *(flat_positions(t) for t in (query, key, value)), data, data, length, length,
            scale=scale, window_size=window,
        )  # fmt: skip
        return out.unflatten(0, (size, length)).transpose(1, 2)
