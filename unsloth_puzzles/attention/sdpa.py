"""PyTorch's `scaled_dot_product_attention`."""

import torch
import torch.nn.functional as F

from unsloth_puzzles.attention.backend import Backend, repeat_heads
from unsloth_puzzles.attention.pattern import Batch, Pattern, dense_mask


class Sdpa(Backend):
    """Its fast kernels know causal and no mask; a window, documents or a cache become a mask of length^2 bytes."""

    name = "sdpa"
    features = frozenset(
        {"window", "documents", "cache", "float32", "gradients on a CPU", "without a GPU", "fullgraph"}
    )
    memory = "none; with a window or documents length^2 bytes a row"

    def prepare(self, pattern: Pattern, batch: Batch) -> torch.Tensor | None:
        square = batch.offset == 0
        if pattern.causal and pattern.window is None and batch.documents is None and square:
            return None  # is_causal says it
        return dense_mask(pattern, batch)

    def run(self, query, key, value, pattern: Pattern, data: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        # A single query sees all keys: it is the last position. A shape, so no part of what is compiled.
        causal = pattern.causal and data is None and query.shape[-2] == key.shape[-2]
        grouped = key.shape[1] != query.shape[1]
        if grouped and data is not None:  # else PyTorch takes its slowest path, which holds all scores
            key, value = (repeat_heads(t, query.shape[1]) for t in (key, value))
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=data, is_causal=causal, scale=scale, enable_gqa=grouped
        )
