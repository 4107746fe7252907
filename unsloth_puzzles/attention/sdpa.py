"""PyTorch's `scaled_dot_product_attention`."""

import torch
import torch.nn.functional as F

from unsloth_puzzles.attention.backend import FEATURES, Backend, repeat_heads
from unsloth_puzzles.attention.pattern import Batch, Pattern, dense_mask
from unsloth_puzzles.device import capability


class Sdpa(Backend):
    """Its fast kernels know causal and no mask; a window, documents or a cache become a mask of length^2 bytes."""

    name = "sdpa"
    features = frozenset(FEATURES) - {"soft cap"}
    takes_empty = True
    memory = "none; with a window or documents length^2 bytes a row"

    def prepare(self, pattern: Pattern, batch: Batch) -> tuple[bool, torch.Tensor | None, bool]:
        """Whether its flag for causal masks says all, the mask if not, and whether a kernel takes grouped heads."""
        groups = _groups_heads(batch)
        if pattern.causal and pattern.window is None and batch.documents is None and batch.offset == 0:
            return True, None, groups
        mask = dense_mask(pattern, batch)
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, (2, 3))
        return False, mask, groups and mask is None

    def run(self, query, key, value, pattern: Pattern, data, scale: float | None) -> torch.Tensor:
        causal, mask, groups = data
        grouped = key.shape[1] != query.shape[1]
        if grouped and not groups:  # else PyTorch would hold all scores
            key, value = (repeat_heads(t, query.shape[1]) for t in (key, value))
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def _groups_heads(batch: Batch) -> bool:
    """Whether a fast kernel takes fewer key heads: on a GPU flash attention's.

    It wants 16 bits, sm_80, and values of the same head size."""
    if batch.device.type != "cuda":
        return True
    same = batch.value_head_size in (None, batch.head_size)
    return same and batch.dtype.itemsize == 2 and capability(batch.device) >= 80
