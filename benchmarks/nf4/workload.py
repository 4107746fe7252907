"""Real bitsandbytes layers to de-quantise, and calls over them that no cache can flatter."""

from collections.abc import Callable, Sequence

import torch

BYTES_READ = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight: the code, the 8-bit absmax, the second absmax


def bytes_per_weight(dtype: torch.dtype) -> float:
    """Bytes that de-quantising one weight to `dtype` must move: 2.516 for 16 bits."""
    return BYTES_READ + dtype.itemsize


def make_layer(rows: int, columns: int, dtype: torch.dtype, device: str):
    """A `Linear4bit` with weights [rows, columns] ~ N(0, 1), NF4, double-quantised, de-quantising to `dtype`."""
    import bitsandbytes as bnb

    settings = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(1, 1, bias=False, **settings)
    weights = torch.randn(rows, columns, dtype=dtype, device=device)
    layer.weight = bnb.nn.Params4bit(weights, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer.in_features, layer.out_features = columns, rows
    return layer.to(device)


def calls(dequantize: Callable, layers: Sequence) -> list[Callable[[], None]]:
    """One call a layer, each keeping its result until its next turn: without that the allocator would hand every call
    the same memory, and the stores would end in the L2 cache."""

    def call_for(layer) -> Callable[[], None]:
        kept = []

        def call() -> None:
            kept[:] = [dequantize(layer)]

        return call

    return [call_for(layer) for layer in layers]
