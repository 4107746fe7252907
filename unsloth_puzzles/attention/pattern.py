"""What is asked of attention: which keys a query sees, and what is done to the scores."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pattern:
    """Query i (its position among the keys) sees key j if all of these hold:

    causal: j <= i. window: i - j < window, so a query sees `window` tokens, itself included, as in transformers'
    `sliding_window` (flash-attn counts one less: its left size is window - 1); only together with `causal`.
    Documents, which belong to a batch and not to the pattern: i and j lie in the same one.

    soft_cap: each score, scaled, becomes soft_cap * tanh(score / soft_cap) before masking (Gemma 2, arXiv 2408.00118).

    Raises ValueError, naming the argument.
    """

    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self):
        if self.window is not None and (not isinstance(self.window, int) or self.window is True or self.window < 1):
            raise ValueError(f"window: got {self.window!r}, need a number of tokens, at least 1, or None")
        if self.window is not None and not self.causal:
            raise ValueError(f"window: got {self.window} with causal=False, need causal=True or no window")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap: got {self.soft_cap!r}, need a number above 0 or None")


@dataclass(frozen=True)
class Batch:
    """What one batch looks like to attention; the queries are the last `q_length` of the `kv_length` positions.

    documents: (batch, kv_length) int32, number of the document at each position, never decreasing, or None if each
    row is one document. gradients: whether a backward will follow. value_head_size: None for that of query and key.
    There may be more queries than keys if each query sees all keys, as in cross attention.
    """

    size: int
    q_length: int
    kv_length: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    documents: torch.Tensor | None = None
    gradients: bool = False
    value_head_size: int | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"query: got {self.heads} heads for {self.kv_heads} key heads, need a multiple")
        if self.documents is not None and tuple(self.documents.shape) != (self.size, self.kv_length):
            need = (self.size, self.kv_length)
            raise ValueError(f"documents: got shape {tuple(self.documents.shape)}, need (batch, keys), here {need}")

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_length - self.q_length


def number_documents(ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) int32: runs of equal `ids`, numbered from 0 in each row; ids (batch, length), any integers.

    An id that comes again after another is a new document, so that a document is always one stretch of positions.
    """
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts.cumsum(-1).to(torch.int32)


def documents_of_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Documents of a packed batch from its position ids (batch, length): one starts where they do not go on by one."""
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return starts.cumsum(-1).to(torch.int32)


def dense_mask(pattern: Pattern, batch: Batch) -> torch.Tensor | None:
    """(batch or 1, 1, q_length, kv_length) bool, True where a query sees a key; None where every query sees all."""
    queries = torch.arange(batch.offset, batch.kv_length, device=batch.device)[:, None]
    keys = torch.arange(batch.kv_length, device=batch.device)
    seen = None
    if pattern.causal and batch.q_length > 1:
        seen = (keys <= queries)[None, None]
    if pattern.window is not None:
        near = (queries - keys < pattern.window)[None, None]
        seen = near if seen is None else seen & near
    if batch.documents is not None:
        same = (batch.documents[:, batch.offset :, None] == batch.documents[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return seen
