"""Bits of `dequantize_nf4` against references, over dtypes, sizes, block sizes and scales so small that they flush."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.build import DEFAULT, PLAIN, Config
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import nf4_weight

BLOCKS = ((64, True), (64, False), (32, True), (4096, True))  # weights a block, and whether its absmax is quantised
SCALES = (1.0, 1e-38, 3e-39)  # of the absmax: two that make products below 2^-126
Reference = Callable[[torch.Tensor, object], torch.Tensor]


class Compared(NamedTuple):
    """Over `cases` of `weights` in all: how many products flushed to zero, and how many weights differ in any bit."""

    cases: int
    weights: int
    flushed: int
    mismatched: int


def compare(
    config: Config, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], device: str, references: Sequence[Reference]
) -> Compared:
    """De-quantise fresh random weights of every shape, block size and scale, and compare all bits.

    Args:
        config: How the kernel is built. With the default the public function is called as well, on a GPU twice: the
            second call recalls the launch. The interpreter recalls none.
        dtype: Of the result.
        shapes: Of the weights.
        device: "cuda", or "cpu" in Triton's interpreter.
        references: Functions of a packed tensor and its state.
    """
    weights = mismatched = cases = flushed = 0
    for shape in shapes:
        for blocksize, nested in BLOCKS:
            packed, state = _quantised(shape, dtype, device, blocksize, nested)
            scaled = [state.state2.absmax, state.offset] if nested else [state.absmax]
            originals = [tensor.clone() for tensor in scaled]
            usual = None
            for scale in SCALES:
                for tensor, original in zip(scaled, originals, strict=True):
                    tensor.copy_(original * scale)
                ours = [run_path(packed, state, config)]
                if config == DEFAULT:
                    ours += [_untransposed(dequantize_nf4(packed, state), packed) for _ in range(1 + packed.is_cuda)]
                exact = [reference(packed, state) for reference in references]
                mismatched += sum(differing(mine, theirs) for mine in ours for theirs in exact)
                usual = ours[0] if usual is None else usual
                flushed += ((ours[0] == 0) & (usual != 0)).sum().item()
                weights, cases = weights + ours[0].numel(), cases + 1
    return Compared(cases, weights, flushed, mismatched)


def bitsandbytes_kernels(packed: torch.Tensor, state) -> torch.Tensor:
    """bitsandbytes' own kernels. On a CPU they round bf16 differently, so they are a reference on a GPU only."""
    from bitsandbytes.functional import dequantize_4bit

    return _untransposed(dequantize_4bit(packed, state), packed)


def contracted(layer, reference: Reference) -> torch.Tensor:
    """The layer's weights with `code2 * absmax2 + offset` as one fused multiply-add.

    On a GPU the plain path is compiled with the fusion allowed. A CPU does not fuse, so there the absmax is computed in
    float64 and rounded once, and `reference` does the rest.
    """
    from bitsandbytes.functional import QuantState

    packed, state = layer.weight.data, layer.weight.quant_state
    if packed.is_cuda:
        return run_path(packed, state, PLAIN._replace(fp_fusion=True))
    second = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()].double()
    absmax = (state.state2.code.double()[state.absmax.int()] * second + state.offset.double()).float()
    return reference(packed, QuantState(absmax, state.shape, state.code, state.blocksize, "nf4", state.dtype))


def run_path(packed: torch.Tensor, state, config: Config) -> torch.Tensor:
    """The kernel built with `config`, over an output full of NaN."""
    out = torch.full(state.shape, float("nan"), dtype=state.dtype, device=packed.device)
    return prepare(nf4_weight(packed, state), out, config).run(out)


def differing(ours: torch.Tensor, reference: torch.Tensor) -> int:
    """How many weights differ in any bit (so +0 is not -0)."""
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return (ours.contiguous().view(bits) != reference.contiguous().view(bits)).sum().item()


def _quantised(shape, dtype, device, blocksize, nested):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, device=device).to(dtype)
    return quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")


def _untransposed(weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return weight.t() if packed.shape[0] == 1 else weight
