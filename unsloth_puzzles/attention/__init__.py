"""Attention behind one interface: causal, windows, packed documents, soft caps, grouped queries; five backends."""

from unsloth_puzzles.attention.interface import BACKENDS, attention, backend_table, prepare
from unsloth_puzzles.attention.pattern import Batch, Pattern

__all__ = ["BACKENDS", "Batch", "Pattern", "attention", "backend_table", "prepare"]
