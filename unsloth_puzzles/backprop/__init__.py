"""A loss on top of a language model's head, whatever the loss, without ever holding the logits."""

from unsloth_puzzles.backprop import losses
from unsloth_puzzles.backprop.linear import MemoryEfficientLinear, memory_efficient_linear

__all__ = ["MemoryEfficientLinear", "losses", "memory_efficient_linear"]
