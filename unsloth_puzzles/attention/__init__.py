"""Attention behind one interface: causal, windows, packed documents, soft caps, grouped queries; five backends.

    Pattern, Batch    what is asked
    prepare -> Mask   the mask of a batch, made ready for the backend that was chosen
    Mask.attend       the call, in each layer

For models of transformers, `models` reads the first from their masks and makes the second a `ModelMask`.
"""

from unsloth_puzzles.attention.interface import BACKENDS, attention, backend_table, prepare
from unsloth_puzzles.attention.pattern import Batch, Pattern

__all__ = ["BACKENDS", "Batch", "Pattern", "attention", "backend_table", "prepare"]
