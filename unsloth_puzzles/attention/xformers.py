"""xformers' `memory_efficient_attention` (arXiv 2112.05682), the one fast kernel beside SDPA's that runs on a T4."""

import ctypes
import importlib.util
from contextlib import suppress
from functools import cache

import torch

from unsloth_puzzles.attention.backend import Backend, document_starts, repeat_heads
from unsloth_puzzles.attention.pattern import Batch, Pattern


class Xformers(Backend):
    """Not inside compiled layers: its masks are Python objects that know the lengths of all documents."""

    name = "xformers"
    features = frozenset({"window", "documents", "float32"})
    memory = "none; with documents their lengths go to the host, once a batch"

    def missing(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("xformers") is None:
            return "xformers is not installed here"
        return _not_loaded() if device.type == "cuda" else "it needs a CUDA GPU"

    def refuses(self, pattern: Pattern, batch: Batch) -> str | None:
        if batch.dtype == torch.float64:
            return "xformers cannot do float64"
        if batch.head_size % 8:
            return f"xformers cannot do head size {batch.head_size}, only multiples of 8"
        return super().refuses(pattern, batch)

    def prepare(self, pattern: Pattern, batch: Batch) -> object:
        from xformers.ops.fmha import attn_bias

        lengths = document_starts(batch).diff().tolist()
        mask = attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=batch.device)
        if not pattern.causal:
            return mask
        # A window longer than any document is none, and one longer than most is refused by xformers for the short ones.
        if pattern.window is None or pattern.window >= max(lengths):
            return mask.make_causal()
        return mask.make_local_attention(pattern.window)

    def run(self, query, key, value, pattern: Pattern, data, scale: float | None) -> torch.Tensor:
        from xformers.ops import memory_efficient_attention

        size, heads, length, _ = query.shape
        # Its kernels for grouped queries have no backward.
        flat = (t.transpose(1, 2).flatten(0, 1)[None] for t in (query, *(repeat_heads(t, heads) for t in (key, value))))
        out = memory_efficient_attention(*flat, attn_bias=data, scale=scale)
        return out[0].unflatten(0, (size, length)).transpose(1, 2)


@cache
def _not_loaded() -> str | None:
    """Why xformers refuses every kernel, PyTorch's own included: without its extension it takes itself for unbuilt."""
    with suppress(ModuleNotFoundError, OSError):
        # xformers is built for CUDA 12, whose runtime a PyTorch for CUDA 13 does not load.
        import nvidia.cuda_runtime

        (folder,) = nvidia.cuda_runtime.__path__
        ctypes.CDLL(f"{folder}/lib/libcudart.so.12", mode=ctypes.RTLD_GLOBAL)
    from xformers import _cpp_lib

    if _cpp_lib._built_with_cuda:
        return None
    return "the extension of xformers does not load here (its wheel needs CUDA 12's runtime, nvidia-cuda-runtime-cu12)"
