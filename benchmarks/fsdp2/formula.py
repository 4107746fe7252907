"""Challenge A's operators as a plain formula, for CPUs, where Triton's interpreter takes seconds a step."""

import math

import torch

_SIGNATURE = (
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, "
    "int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor"
)
torch.library.define("nf4_formula::dequantize_nf4", _SIGNATURE)
torch.library.define("nf4_formula::dequantize_nf4_again", _SIGNATURE.replace("(", "(Tensor grad_output, ", 1))
OPERATORS = torch.ops.nf4_formula  # in place of `torch.ops.unsloth_puzzles`


def dequantize(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    """A double-quantised weight, `shape` in `dtype`."""
    index = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1).long()[: math.prod(shape)]
    scales = code2[absmax.long()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)] + offset  # [blocks]
    return (code[index] * scales.repeat_interleave(blocksize)[: len(index)]).view(shape).to(dtype)


torch.library.impl("nf4_formula::dequantize_nf4", "CPU", dequantize)
torch.library.impl("nf4_formula::dequantize_nf4_again", "CPU", lambda grad_output, *parts: dequantize(*parts))


@torch.library.register_fake("nf4_formula::dequantize_nf4")
def _(packed, *parts):
    return torch.empty(parts[-2], dtype=parts[-1], device=packed.device)


@torch.library.register_fake("nf4_formula::dequantize_nf4_again")
def _(grad_output, packed, *parts):
    return torch.empty(parts[-2], dtype=parts[-1], device=packed.device)
