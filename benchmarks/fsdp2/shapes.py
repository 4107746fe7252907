"""Sizes of decoder layers."""

SHAPES = {  # of decoder layers: hidden size, inner size, heads, heads of keys and values
    "Llama 3.1 8B": (4096, 14336, 32, 8),
    "Llama 3.1 70B": (8192, 28672, 64, 8),
    "Llama 3.2 1B": (2048, 8192, 32, 8),
    "tiny": (64, 128, 4, 2),
}
HEAD_SIZE = 128  # of both sizes of Llama 3.1
