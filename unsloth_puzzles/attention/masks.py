"""The masks of transformers' models in the words of `Pattern` and `Batch`: causal or not, a window, documents.

transformers describes a mask by a function of batch, head, query and key. `read` takes such functions apart. What has
no such words, transformers itself makes dense: `dense`. No mask is guessed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import masking_utils

from unsloth_puzzles.attention.pattern import Pattern, number_documents


class Unpadded(torch.Tensor):
    """An attention mask of ones. Its class says so, since reading the values would wait for the GPU."""


class Unreadable(ValueError):
    """A mask that `Pattern` and documents do not describe."""


class EmptyWindow(Unreadable):
    """A window of less than one token. Models whose config has no window make such a mask, and no layer uses it."""


@dataclass(frozen=True)
class Lengths:
    """Which positions the queries and the keys of a batch are at: the first of each, and how many."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int


def read(
    mask_function: Callable, lengths: Lengths, attention_mask: torch.Tensor | None, soft_cap: float | None = None
) -> tuple[Pattern, torch.Tensor | None]:
    """Read a mask of transformers.

    Padding is a document of its own: real tokens do not see it, and padding sees itself, so that no row is empty. So
    what is computed at padding is not what transformers computes there, whose own kinds of attention differ in it.

    Args:
        mask_function: transformers' function of batch, head, query and key.
        lengths: the positions of queries and keys.
        attention_mask: [batch, positions], 0 for padding, or None.
        soft_cap: of the pattern; no mask has one.

    Returns:
        The pattern, and the documents of the keys, [batch, kv_length] int32 or None.

    Raises:
        Unreadable: another function of the mask, padding between real tokens, or queries that are not the last keys.
    """
    causal, window, ids, positions = _parts(mask_function, lengths)
    if window is not None and not causal:
        raise Unreadable(f"mask_function must have causal_mask_function beside a window, got a window ({window}) alone")
    documents = None
    for one in ids:
        one = number_documents(one)
        documents = one if documents is None else number_documents(documents * (one.shape[1] + 1) + one)
    for one in positions:
        _check_positions(one, documents)
    if causal or documents is not None:
        _check_ends(lengths)
    if attention_mask is not None and not isinstance(attention_mask, Unpadded):
        documents = _with_padding(attention_mask, causal, documents, lengths)
    return Pattern(causal, window, soft_cap), documents


def dense(
    mask_function: Callable, lengths: Lengths, attention_mask: torch.Tensor | None, use_vmap: bool, device: torch.device
) -> torch.Tensor:
    """The mask [batch, 1, q_length, kv_length] bool as transformers makes it, from the arguments of `read`.

    A query that sees nothing sees all instead: it is padding, and would be NaN.
    """
    seen = masking_utils.sdpa_mask(
        **vars(lengths), mask_function=mask_function,
        attention_mask=None if attention_mask is None else attention_mask.bool(), allow_is_causal_skip=False,
        use_vmap=use_vmap, device=device,
    )  # fmt: skip
    return seen | ~seen.any(-1, keepdim=True)


def _check_ends(lengths: Lengths) -> None:
    if lengths.q_offset + lengths.q_length != lengths.kv_offset + lengths.kv_length:
        raise Unreadable(
            f"past_key_values must end with the queries (no static cache), got {lengths.q_length} queries from "
            f"position {lengths.q_offset} on for {lengths.kv_length} keys from {lengths.kv_offset} on"
        )


def _check_positions(positions: torch.Tensor, documents: torch.Tensor | None) -> None:
    """Within a document, positions that follow one another are as far apart as their places in the row."""
    jumps = positions.diff(dim=-1) != 1  # [batch, kv_length - 1]
    ends = torch.zeros_like(jumps) if documents is None else documents.diff(dim=-1) != 0
    if (jumps & ~ends).any():
        raise Unreadable("position_ids must count up by 1 within a packed sequence, got a jump in one")


def _with_padding(attention_mask: torch.Tensor, causal: bool, documents: torch.Tensor | None, lengths: Lengths):
    end = lengths.kv_offset + lengths.kv_length
    if attention_mask.shape[1] < end:
        raise Unreadable(
            f"attention_mask must have {end} positions, cached ones included, got {attention_mask.shape[1]}"
        )
    real = attention_mask[:, lengths.kv_offset : end].bool()
    # Padding on the right alone is hidden by causality; like transformers, wait once a batch to know.
    hidden = real[:, 1:] <= real[:, :-1] if causal else real
    if hidden.all():
        return documents
    if not causal:  # in cross attention, a query at a key's position is another sequence's: it sees the real keys
        raise Unreadable("attention_mask must be ones where queries see later keys, as in encoders, got zeros")
    if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        raise Unreadable("attention_mask must have padding at the ends of a row alone, got zeros between ones")
    return number_documents(real.int() if documents is None else 2 * documents + real)


def _parts(
    mask_function: Callable, lengths: Lengths, positions: torch.Tensor | None = None
) -> tuple[bool, int | None, list[torch.Tensor], list[torch.Tensor]]:
    """(causal, window, ids, positions): a query sees a key where all of them let it; (batch, kv_length) each.

    transformers' functions are closures, known by their code. `mask_check` knows whether they mean what is read here.

    Args:
        mask_function: as in `read`.
        lengths: as in `read`.
        positions: what `mask_function` is given in place of the places of queries and keys in a row, [batch,
            kv_length]; None for those places. In the result there are those that were given to a part.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None, [], []
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None, [], []
    code = getattr(mask_function, "__code__", mask_function)  # never None, as which an unknown part is kept
    free = dict(zip(getattr(code, "co_freevars", ()), getattr(mask_function, "__closure__", None) or (), strict=False))
    free = {name: cell.cell_contents for name, cell in free.items()}
    if code is _WINDOW:
        window = free["sliding_window"]
        if window < 1:
            raise EmptyWindow(f"sliding_window must be at least 1, got {window}")
        return False, window, [], []
    if code is _PACKED:
        if positions is not None:
            raise Unreadable("mask_function must take packed sequences by place, got ones by position in a sequence")
        return False, None, [_stretches(free["packed_sequence_mask"], lengths)], []
    if code is _CHUNKED:
        if positions is None:
            positions = torch.arange(lengths.kv_length, device=free["left_padding"].device) + lengths.kv_offset
        return False, None, [(positions - free["left_padding"][:, None]) // free["chunk_size"]], []
    if code is _AND:
        parts = [_parts(part, lengths, positions) for part in free["mask_functions"]]
        causal, windows, ids, remapped = zip(*parts, strict=True)
        windows = [window for window in windows if window is not None]
        return any(causal), min(windows, default=None), [*chain(*ids)], [*chain(*remapped)]
    if code is _REMAPPED and positions is None:
        positions, need = free["position_ids"], (lengths.batch_size, lengths.q_length)
        if lengths.kv_offset or lengths.q_length != lengths.kv_length or tuple(positions.shape) != need:
            raise Unreadable(f"position_ids must be those of all queries and keys {need}, got {tuple(positions.shape)}")
        causal, window, ids, _ = _parts(free["mask_function"], lengths, positions)
        return causal, window, ids, [positions]
    name = getattr(mask_function, "__qualname__", mask_function)
    raise Unreadable(
        f"mask_function must be causal, bidirectional, a sliding window, chunks or packed sequences, got {name}"
    )


def _stretches(ids: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """The keys' part of `ids`, (batch or 1, positions), if equal ones are neighbours: documents are stretches here."""
    end = lengths.kv_offset + lengths.kv_length
    if ids.shape[0] not in (1, lengths.batch_size) or ids.shape[1] < end:
        raise ValueError(
            f"packed_sequence_mask must have shape ({lengths.batch_size}, {end}) at least, got {tuple(ids.shape)}"
        )
    ids = ids[:, lengths.kv_offset : end]
    changes, kinds = (t.diff(dim=-1).ne(0).sum(-1) for t in (ids, ids.sort(-1).values))
    if not torch.equal(changes, kinds):
        raise Unreadable("packed_sequence_mask must have each sequence in one stretch, got an id again after another")
    return ids.expand(lengths.batch_size, -1)


_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
_CHUNKED = masking_utils.chunked_overlay(1, torch.empty(0)).__code__
_AND = masking_utils.and_masks().__code__
# Newer releases give the parts of a packed mask the positions within a sequence.
REMAP_NAME = "remap_positions_for_packed_sequence"
_REMAPPED = None
if hasattr(masking_utils, REMAP_NAME):
    _REMAPPED = getattr(masking_utils, REMAP_NAME)(masking_utils.causal_mask_function, torch.empty(0)).__code__
