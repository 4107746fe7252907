"""NF4 de-quantisation in one Triton kernel, and the 4-bit linear layer built on it."""

from unsloth_puzzles.nf4.dequantize import dequantize_nf4

__all__ = ["dequantize_nf4"]
