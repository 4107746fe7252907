"""NF4 de-quantisation in one Triton kernel, and the 4-bit linear layer built on it."""

from unsloth_puzzles.nf4.dequantize import dequantize_nf4
from unsloth_puzzles.nf4.linear import nf4_linear
from unsloth_puzzles.nf4.patch import patch_linear4bit

__all__ = ["dequantize_nf4", "nf4_linear", "patch_linear4bit"]
