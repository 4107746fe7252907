"""Whether transformers' mask functions mean what `masks.read` takes them to mean."""

from collections.abc import Callable

import torch
import transformers
from transformers import masking_utils

from unsloth_puzzles.attention.masks import REMAP_NAME, Lengths, read
from unsloth_puzzles.attention.pattern import Batch, dense_mask


def check() -> None:
    """Raise RuntimeError unless transformers' mask functions say what `read` takes them to say.

    Each is compared with `dense_mask`, on queries and keys that are too few to take time.
    """
    ids, padding = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), torch.tensor([1])
    window = masking_utils.sliding_window_causal_mask_function(3)
    sizes = {"size": 1, "kv_length": 8, "heads": 1, "kv_heads": 1, "head_size": 8}
    sizes |= {"dtype": torch.float32, "device": torch.device("cpu")}
    for name, function in {
        "causal_mask_function": masking_utils.causal_mask_function,
        "bidirectional_mask_function": masking_utils.bidirectional_mask_function,
        "sliding_window_overlay": window,
        "packed_sequence_mask_function": masking_utils.packed_sequence_mask_function(ids),
        "chunked_overlay": masking_utils.chunked_overlay(3, padding),
        "and_masks": masking_utils.and_masks(window, masking_utils.packed_sequence_mask_function(ids)),
        **_remapped(ids, window, padding),
    }.items():
        q_length = 8 if name == REMAP_NAME else 6
        lengths = Lengths(1, q_length, 8, 8 - q_length, 0)
        pattern, documents = read(function, lengths, None)
        seen = dense_mask(pattern, Batch(documents=documents, q_length=q_length, **sizes))
        seen = torch.ones(1, 1, q_length, 8, dtype=torch.bool) if seen is None else seen
        theirs = masking_utils.sdpa_mask(**vars(lengths), mask_function=function, allow_is_causal_skip=False)
        if not torch.equal(seen.expand(1, 1, q_length, 8), theirs):
            raise RuntimeError(
                f"transformers must have the masks of 5.15 to 5.24, got another masking_utils.{name}; "
                f"this is transformers {transformers.__version__}"
            )


def _remapped(ids: torch.Tensor, window: Callable, padding: torch.Tensor) -> dict[str, Callable]:
    """A packed mask whose parts are given positions that start anew in each sequence, where transformers makes such."""
    if not hasattr(masking_utils, REMAP_NAME):
        return {}
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    parts = masking_utils.and_masks(window, masking_utils.chunked_overlay(2, 0 * padding))
    remapped = getattr(masking_utils, REMAP_NAME)(parts, positions)
    return {REMAP_NAME: masking_utils.and_masks(remapped, masking_utils.packed_sequence_mask_function(ids))}
