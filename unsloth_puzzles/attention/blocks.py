"""Which blocks of the score matrix flex attention visits, from comparisons of the blocks' ends alone.

`create_block_mask` evaluates the mask at every (query, key): length^2 values. Here a block is judged by its first and
last position and document, (length / 128)^2 values, and window and documents are tensors, so neither their values nor
the length is part of compiled code.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from unsloth_puzzles.attention.pattern import Batch, Pattern

BLOCK = 128  # positions a side: flex attention's default, a multiple of every tile size that its kernels use
_EVERYTHING = 2**30  # a window that no sequence reaches


class Blocks:
    """The mask of a batch for flex attention. Only tensors, so that compiled code takes any of the same head sizes.

    documents: (batch, kv_length + 1); window, offset: 0-dim, int32. tables: number and indices of the key blocks of
    each query block, (batch, 1, blocks) and (batch, 1, blocks, blocks), of partly and of wholly visible ones, and the
    same by key block, for the backward. kernel_options: what flex attention's kernels are built with.
    """

    def __init__(self, pattern: Pattern, batch: Batch, kernel_options: dict | None = None):
        self.kernel_options = kernel_options
        device = batch.device
        documents = batch.documents
        if documents is None:
            documents = torch.zeros(batch.size, batch.kv_length, dtype=torch.int32, device=device)
        self.causal = pattern.causal
        # One more position, which none sees: compiled code takes a size of 1 for a constant, so `Flex` pads it to 2.
        self.documents = torch.cat([documents, documents[:, -1:] + 1], dim=-1)  # [batch, kv_length + 1]
        self.window = torch.full((), pattern.window or _EVERYTHING, dtype=torch.int32, device=device)
        self.offset = torch.full((), batch.offset, dtype=torch.int32, device=device)
        partial, full = visible_blocks(pattern, batch, self.documents)
        by_query = (*_ordered(partial), *_ordered(full))
        by_key = (*_ordered(partial.transpose(-1, -2)), *_ordered(full.transpose(-1, -2)))
        self.tables = (*by_query, *by_key)
        torch._dynamo.maybe_mark_dynamic(self.documents, 1)
        for table in self.tables:
            torch._dynamo.maybe_mark_dynamic(table, tuple(range(2, table.dim())))

    def block_mask(self, q_length: int, kv_length: int) -> BlockMask:
        """Made where attention is computed, inside compiled code if there is any: the lengths are its variables."""
        documents, window, offset, causal = self.documents, self.window, self.offset, self.causal

        def sees(b, h, q, k):
            i = q + offset
            same = documents[b, i] == documents[b, k]
            return same & (k <= i) & (i - k < window) if causal else same

        kv_num, kv, full_kv_num, full_kv, q_num, q, full_q_num, full_q = self.tables
        return BlockMask(
            seq_lengths=(q_length, kv_length),
            kv_num_blocks=kv_num,
            kv_indices=kv,
            full_kv_num_blocks=full_kv_num,
            full_kv_indices=full_kv,
            q_num_blocks=q_num,
            q_indices=q,
            full_q_num_blocks=full_q_num,
            full_q_indices=full_q,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=sees,
        )


def visible_blocks(pattern: Pattern, batch: Batch, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial, full), each (batch, 1, query blocks, key blocks) bool: blocks to be masked one by one, and blocks in
    which every query sees every key. A block in neither holds nothing that is seen; one that is partial may, too."""
    q_first, q_last, q_inside = _ends(batch.q_length, batch.offset, documents.device)
    k_first, k_last, k_inside = _ends(batch.kv_length, 0, documents.device)
    q_first, q_last, q_inside = (t[:, None] for t in (q_first, q_last, q_inside))  # [query blocks, 1]
    # Documents never decrease, so those of a block are an interval.
    q_from, q_to = (documents[:, t] for t in (q_first, q_last))  # [batch, query blocks, 1]
    k_from, k_to = (documents[:, None, t] for t in (k_first, k_last))  # [batch, 1, key blocks]
    some = (q_from <= k_to) & (k_from <= q_to)  # [batch, query blocks, key blocks]
    full = (q_from == q_to) & (k_from == k_to) & (q_from == k_from)
    if pattern.causal:
        some = some & (k_first <= q_last)
        full = full & (k_last <= q_first)
    if pattern.window is not None:
        some = some & (q_first - k_last < pattern.window)
        full = full & (q_last - k_first < pattern.window)
    some = some & (q_inside > 0) & (k_inside > 0)
    full = full & (q_inside == BLOCK) & (k_inside == BLOCK)
    return (some & ~full)[:, None], (some & full)[:, None]


def _ends(length: int, offset: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and last position of each block, and how many of its positions exist. A block beyond the end has none."""
    # [blocks], two at least, as with the positions.
    starts = torch.arange(max(2, -(-length // BLOCK)), device=device) * BLOCK
    inside = (length - starts).clamp(0, BLOCK)
    first = starts.clamp(max=length - 1)
    return first + offset, first + offset + (inside - 1).clamp(min=0), inside


def _ordered(visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of visible blocks in each row, and all blocks' indices, the visible ones first and in order; int32.

    [..., blocks, others] bool -> [..., blocks], [..., blocks, others].
    """
    first = torch.argsort(visible.to(torch.int8), dim=-1, descending=True, stable=True)
    return visible.sum(-1, dtype=torch.int32), first.to(torch.int32).contiguous()
