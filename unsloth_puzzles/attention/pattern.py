"""What is asked of attention: which keys a query sees, and what is done to the scores."""

import math
from dataclasses import dataclass

import torch

LAYOUT = "the layout is (batch, heads, length, head size)"  # the end of refusals


@dataclass(frozen=True)
class Pattern:
    """Query i (its position among the keys) sees key j if all conditions hold.

    Documents, which belong to a batch and not to the pattern, are one more: i and j lie in the same one.

    Args:
        causal: j <= i.
        window: i - j < window, so a query sees `window` tokens, itself included, as in transformers' `sliding_window`
            (flash-attn counts one less: its left size is window - 1); only together with `causal`. None: no condition.
        soft_cap: each score, scaled, becomes soft_cap * tanh(score / soft_cap) before masking (Gemma 2, arXiv
            2408.00118). None: it stays.

    Raises:
        ValueError: naming the argument.
    """

    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self):
        if self.window is not None and (not isinstance(self.window, int) or self.window is True or self.window < 1):
            raise ValueError(f"window must be a number of tokens, at least 1, or None, got {self.window!r}")
        if self.window is not None and not self.causal:
            raise ValueError(f"window must be None with causal=False, got {self.window}")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:  # at infinity the scores would be NaN
            raise ValueError(f"soft_cap must be a finite number above 0 or None, got {self.soft_cap!r}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes, dtype and documents of one batch; the queries are the last `q_length` of the `kv_length` positions.

    There may be more queries than keys if each query sees all keys, as in cross attention.

    Args:
        size: rows.
        q_length, kv_length: queries and keys of a row.
        heads, kv_heads: of the queries and of the keys; the first a multiple of the second.
        head_size: of query and key.
        dtype, device: of all tensors.
        documents: [batch, kv_length] int32, number of the document at each position, never decreasing; None if each
            row is one document.
        gradients: whether a backward will follow.
        value_head_size: None for that of query and key.

    Raises:
        ValueError: naming the argument.
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
        if 0 in (self.heads, self.kv_heads, self.head_size):
            raise ValueError(
                f"query and key must have heads of size 1 or more, got {self.heads} and {self.kv_heads} heads of size "
                f"{self.head_size}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"query must have a multiple of the {self.kv_heads} key heads, got {self.heads} heads; {LAYOUT}"
            )
        if self.documents is not None and tuple(self.documents.shape) != (self.size, self.kv_length):
            need = (self.size, self.kv_length)
            raise ValueError(
                f"documents must have shape (batch, keys) {need}, got {tuple(self.documents.shape)}; "
                f"for query, key and value {LAYOUT}"
            )

    @classmethod
    def of(cls, query, key, value, documents: torch.Tensor | None = None, *, gradients: bool) -> "Batch":
        """The batch of query [batch, heads, q_length, head size], key and value [batch, key heads, kv_length, size]."""
        size, heads, q_length, head_size = query.shape
        _, kv_heads, kv_length, _ = key.shape
        return cls(
            size=size,
            q_length=q_length,
            kv_length=kv_length,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            dtype=query.dtype,
            device=query.device,
            documents=documents,
            gradients=gradients,
            value_head_size=value.shape[3],
        )

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_length - self.q_length


def number_documents(ids: torch.Tensor) -> torch.Tensor:
    """Number runs of equal ids from 0 in each row.

    An id that comes again after another is a new document, so that a document is always one stretch of positions.

    Args:
        ids: [batch, length], any integers.

    Returns:
        [batch, length] int32.
    """
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts.cumsum(-1).to(torch.int32)


def dense_mask(pattern: Pattern, batch: Batch) -> torch.Tensor | None:
    """Where a query sees a key: [batch or 1, 1, q_length, kv_length] bool; None where every query sees all."""
    queries = torch.arange(batch.offset, batch.kv_length, device=batch.device)[:, None]  # [q_length, 1]
    keys = torch.arange(batch.kv_length, device=batch.device)  # [kv_length]
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
