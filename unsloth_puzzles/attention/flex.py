"""Flex attention, with lengths, windows and documents that may change without being compiled again."""

import itertools
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.fx.experimental import _config as fx_config
from torch.nn.attention.flex_attention import flex_attention

from unsloth_puzzles.attention.backend import FEATURES, Backend
from unsloth_puzzles.attention.blocks import Blocks
from unsloth_puzzles.attention.pattern import Batch, Pattern
from unsloth_puzzles.code_object import with_own_code
from unsloth_puzzles.device import capability

_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
_ROOM = 2**15  # bytes for a tile's operands: half of a T4's shared memory


class Flex(Backend):
    """Triton code that Inductor makes from the mask and the soft cap (arXiv 2412.05496).

    On a CPU PyTorch evaluates the same mask and scores in full, for checking results. Inductor's kernel for CPUs is not
    used: with lengths like 8, 40 or 88 it gave values that differed from run to run (torch 2.11).
    """

    name = "flex"
    features = frozenset(FEATURES) - {"gradients on a CPU"}
    memory = "none"
    splits_at = 128  # Inductor asks whether its decoding kernel could be taken, also where it may not

    def refuses(self, pattern: Pattern, batch: Batch) -> str | None:
        if batch.dtype == torch.float64:
            return "flex cannot do float64"
        if batch.offset < 0:
            return f"flex cannot do {batch.q_length} queries for {batch.kv_length} keys, only for as many and more"
        sizes = (batch.head_size, batch.value_head_size or batch.head_size)
        if min(sizes) < 16:
            return f"flex cannot do head size {min(sizes)}, only 16 and more"
        if 0 < capability(batch.device) < 80 and _small_tile(max(sizes), batch.dtype, _ROOM) is None:
            return f"flex cannot do head size {max(sizes)} in {batch.dtype} with a T4's shared memory"
        return super().refuses(pattern, batch)

    def prepare(self, pattern: Pattern, batch: Batch) -> Blocks:
        return Blocks(pattern, batch, kernel_options(batch))

    def run(self, query, key, value, pattern: Pattern, data: Blocks, scale: float | None) -> torch.Tensor:
        if torch.compiler.is_compiling():  # part of a layer that is being compiled
            if query.device.type == "cpu":
                raise ValueError("backend must be sdpa in a layer that is compiled for a CPU, got 'flex'")
            return _flex(query, key, value, scale, pattern.soft_cap, data)
        length = query.shape[-2]
        if query.device.type == "cpu":  # without gradients, as `refuses` has seen to, but PyTorch looks at the flag
            query, key, value = (t.detach() for t in (query, key, value))
        if key.shape[-2] == 1:  # compiled code takes a size of 1 for a constant
            key, value = (F.pad(t, (0, 0, 0, 1)) for t in (key, value))
        if length == 1:
            query = F.pad(query, (0, 0, 0, 1))
        for tensor in (query, key, value):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        # Else sizes that happen to be equal (a length and a number of blocks) are compiled as though they always were.
        with fx_config.patch(use_duck_shape=False):
            compiled = _compiled(_configuration(query, key, value), pattern.causal, pattern.soft_cap, scale)
            return compiled(query, key, value, scale, pattern.soft_cap, data)[..., :length, :]


def _flex(query, key, value, scale: float | None, soft_cap: float | None, blocks: Blocks) -> torch.Tensor:
    def capped(score, b, h, q, k):
        return soft_cap * torch.tanh(score / soft_cap)

    return flex_attention(
        query,
        key,
        value,
        score_mod=None if soft_cap is None else capped,
        block_mask=blocks.block_mask(query.shape[-2], key.shape[-2]),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=blocks.kernel_options,
    )


def _configuration(query, *others) -> tuple:
    """The properties of the tensors that are constants of the compiled code."""
    sizes = tuple((t.shape[1], t.shape[3], t.requires_grad) for t in (query, *others))
    return query.device.type, query.dtype, torch.is_grad_enabled(), *sizes


@cache
def _compiled(configuration: tuple, *constants: object) -> Callable:
    """`_flex` for one configuration: Dynamo allows a function eight, and would make variables of scale and soft cap,
    which flex attention does not take."""
    backend = "aot_eager" if configuration[0] == "cpu" else "inductor"
    return torch.compile(with_own_code(_flex, f"flex_{next(_numbers)}"), fullgraph=True, backend=backend)


_numbers = itertools.count()


def kernel_options(batch: Batch) -> dict | None:
    """One kernel for all lengths; where Inductor's tiles may not fit, with tiles, stages and warps of our own.

    That is below sm_80, and for float32 heads larger than 128: Inductor knows tiles for heads of 64, 128 and 256.
    Left to itself Inductor takes its decoding kernel where the first length it compiles for is below 128, and fails
    with "No choices to select" (torch 2.11, first length 77, H200). Its tiles and stages depend on the card, and those
    for newer cards take more shared memory than the 64 KiB of a T4.
    """
    if batch.device.type != "cuda":
        return None
    options = {"BACKEND": "TRITON"}
    size, old = max(batch.head_size, batch.value_head_size or 0), capability(batch.device) < 80
    if old or (batch.dtype == torch.float32 and size > 128):
        rows = _small_tile(size, batch.dtype, _ROOM if old else 2 * _ROOM)
        if rows is not None:
            options |= {**dict.fromkeys(_TILES, rows), "num_stages": 1, "num_warps": 4}
    return options


def _small_tile(head_size: int, dtype: torch.dtype, room: int) -> int | None:
    """The largest tile height (32 or 16) at which four tiles fit `room` bytes, as the backward needs; None if neither
    fits."""
    size = 1 << (head_size - 1).bit_length()  # padded to a power of two
    return next((rows for rows in (32, 16) if 4 * rows * size * dtype.itemsize <= room), None)
