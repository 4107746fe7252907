"""Attention by its formula: the reference in float64, and what remains where no kernel can do what is asked."""

import math

import torch

from unsloth_puzzles.attention.backend import FEATURES, Backend, repeat_heads
from unsloth_puzzles.attention.pattern import Batch, Pattern, dense_mask


class Dense(Backend):
    """softmax(soft cap(scale Q K^T) + mask) V with all scores in memory, in float32 (float64 stays)."""

    name = "dense"
    features = frozenset(FEATURES)
    takes_empty = True
    memory = "heads x length^2 scores, several times"

    def prepare(self, pattern: Pattern, batch: Batch) -> torch.Tensor | None:
        return dense_mask(pattern, batch)

    def run(self, query, key, value, pattern: Pattern, data: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        key, value = (repeat_heads(t, query.shape[1]) for t in (key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = scale * (query.to(wide) @ key.to(wide).transpose(-1, -2))  # [batch, heads, q_length, kv_length]
        if pattern.soft_cap is not None:
            scores = pattern.soft_cap * torch.tanh(scores / pattern.soft_cap)
        if data is not None:
            scores = scores.masked_fill(~data, -math.inf) if data.dtype == torch.bool else scores + data
        return (scores.softmax(-1) @ value.to(wide)).to(query.dtype)
